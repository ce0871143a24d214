"""Hugging Face folders: their files, their settings, and the names of their tensors."""
