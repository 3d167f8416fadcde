"""Hugging Face directories: configuration, weights and tokenizers, without PyTorch."""
