"""What a person may set, and which settings work together. Imports neither torch nor numpy nor Triton."""
