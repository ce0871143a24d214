"""A model in a folder, a checkpoint of ours or a Hugging Face folder: opened, built, and its logits computed."""
