"""The training engine: pair layouts, precision, optimizers and one training step."""
