"""Files that go into exported Hugging Face folders. They import torch, transformers and each other, nothing else."""
