"""What every room may use and what knows of none: errors, files, console, signals, tensors on disk."""
