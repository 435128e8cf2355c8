"""Line charts as inline SVG with text for those who cannot see them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _BELOW = 420, 220, 74, 26
_COLOURS = 3
"""Colours of `mapo_fast.util.page`, the classes c0, c1, …"""


class Curve(NamedTuple):
    """Points of one curve, and for each of them low and high of its interval, where there is one."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure with a caption; points that are not finite are left out."""
    drawn = [Curve(c.name, [p for p in c.points if math.isfinite(p[1])], c.band) for c in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return ""
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    ys += [y for curve in drawn for pair in curve.band for y in pair if math.isfinite(y)]
    low, high = min(ys), max(ys)
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> str:
        across = (x - first) / (last - first or 1)
        up = (y - low) / (high - low or 1)
        return f"{_LEFT + across * (_WIDTH - _LEFT - 8):.1f},{8 + (1 - up) * (_HEIGHT - _BELOW - 8):.1f}"

    parts = []
    for number, curve in enumerate(drawn):
        colour = f"c{number % _COLOURS}"
        steps = [x for x, _ in curve.points]
        if len(curve.band) == len(steps):
            edge = [at(x, h) for x, (_, h) in zip(steps, curve.band, strict=True)]
            edge += [at(x, b) for x, (b, _) in zip(steps[::-1], curve.band[::-1], strict=True)]
            parts.append(f'<polygon points="{" ".join(edge)}" class="{colour} band"/>')
        line = " ".join(at(x, y) for x, y in curve.points)
        parts.append(f'<polyline points="{line}" class="{colour} line"/>')
    zero = at(first, 0).split(",")[1] if low < 0 < high else None
    if zero is not None:
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{zero}" y2="{zero}" class="zero"/>')
    parts += _labels(low, high, first, last)
    text = "; ".join(f"{c.name} from {c.points[0][1]:.4g} to {c.points[-1][1]:.4g}" for c in drawn)
    names = " · ".join(
        f'<span class="c{i % _COLOURS}">{html.escape(curve.name)}</span>' for i, curve in enumerate(drawn)
    )
    label = html.escape(f"{title}: {text}")
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {names if len(drawn) > 1 else ''}</figcaption>"
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _labels(low: float, high: float, first: float, last: float) -> list[str]:
    def text(x: float, y: float, words: str, anchor: str) -> str:
        return (
            f'<text x="{x}" y="{y}" font-size="12" fill="currentColor" text-anchor="{anchor}">{words}</text>'
        )

    return [
        text(_LEFT - 6, 18, f"{high:.3g}", "end"),
        text(_LEFT - 6, _HEIGHT - _BELOW, f"{low:.3g}", "end"),
        text(_LEFT, _HEIGHT - 6, f"step {first:g}", "start"),
        text(_WIDTH - 8, _HEIGHT - 6, f"{last:g}", "end"),
    ]
