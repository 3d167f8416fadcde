"""Weights and tokenizers of Hugging Face and T5X, in and out."""
