"""Registers the scorers of this package; those of others come by entry point or `--allow-code`."""

from mapo_fast.score import aesthetic, clip_scorers, compression, legibility, safety

__all__ = ["aesthetic", "clip_scorers", "compression", "legibility", "safety"]
