"""Measurements: `python -m benchmarks.{routing,training,decoding,memory,gpu}`."""
