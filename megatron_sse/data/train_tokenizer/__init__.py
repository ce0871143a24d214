"""A tokenizer made of one's own texts, by the tokenizers library."""
