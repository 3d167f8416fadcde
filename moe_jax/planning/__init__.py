"""The memory, traffic and time of a training step, computed from the compiled program."""
