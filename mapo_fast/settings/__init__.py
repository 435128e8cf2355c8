"""All settings, and the rules on which of them work together. Imports neither torch nor numpy nor Triton."""
