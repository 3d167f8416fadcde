"""Answers of a trained model: search, sampling, scoring."""
