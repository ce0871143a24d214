"""Files that go into exported Hugging Face folders.

They import torch, transformers and each other, and hf.bank_kernels where this package is installed; nothing else.
"""
