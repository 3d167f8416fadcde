"""Scores of a model on tasks, and relative gains over another model."""
