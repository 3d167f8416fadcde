"""Task-level mixture-of-experts transformers in JAX/Flax."""

__version__ = "0.1.0"
