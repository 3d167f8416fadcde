"""What a training step would need on devices that are not at hand."""
