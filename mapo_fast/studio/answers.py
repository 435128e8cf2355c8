"""Answers to a pair of pictures."""

from __future__ import annotations

from typing import Literal

Answer = Literal["left", "right", "tie", "both_bad"]
