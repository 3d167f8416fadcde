"""Task modules: each registers SeqIO tasks and mixtures when imported."""
