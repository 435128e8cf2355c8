"""NVIDIA's compute capabilities from which something runs, as one number, 89 for 8.9. Imports nothing."""

OLDEST_CAPABILITY = 75
"""Oldest one that every kernel is compiled for ahead of time in the tests."""
OLDEST_FP8_CAPABILITY = 89
"""Oldest one that multiplies fp8."""
