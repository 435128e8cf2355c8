"""Where preference pairs come from, a layout a file."""
