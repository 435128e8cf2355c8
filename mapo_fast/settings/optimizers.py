"""What the settings know of optimizers."""

from __future__ import annotations

REMOVED = {
    "paged_adamw8bit": "it was removed. Use 'adamw8bit', with offload.optimizer = 'cpu' for states in system "
    "RAM, in a new run: begin it from the weights of the last checkpoint, whose README.txt says how to load "
    "them",
}
"""Optimizers of older versions, and what to do without them."""
