"""NVIDIA's compute capabilities from which something runs, as one number, 89 for 8.9. Imports nothing."""

OLDEST_CAPABILITY = 75
"""Oldest capability that the tests compile every kernel for."""
OLDEST_FP8_CAPABILITY = 89
"""Oldest capability that multiplies fp8."""
