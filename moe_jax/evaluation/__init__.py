"""Scores of a model on tasks, and what it gained over another."""
