"""The held-out split: by prompt and image content, never by row.

Pairs that share a prompt or an image are connected; connected pairs go to the same side, so that nothing the
model trains on is met again in evaluation. The components are taken in the order of the hash of their
smallest member until the share is reached: the split depends on the content alone, not on row order. A
component that would overshoot the share stays in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out_pairs(members: Sequence[Sequence[bytes]], share: float) -> list[bool]:
    """For each pair, given the keys of its prompt and images, whether it is held out.

    At least one component is held out where share > 0 and a component of at most half the pairs exists.
    """
    roots = _components(members)
    size: dict[bytes, int] = {}
    for root in roots:
        size[root] = size.get(root, 0) + 1
    order = sorted(size, key=lambda root: hashlib.sha256(root).digest())
    target = share * len(members)
    held: set[bytes] = set()
    count = 0
    for root in order:
        if count + size[root] <= target:
            held.add(root)
            count += size[root]
    if not held and share > 0 and order:
        smallest = min(order, key=lambda root: size[root])  # the first in hash order among equals
        if 2 * size[smallest] <= len(members):
            held.add(smallest)
    return [root in held for root in roots]


def _components(members: Sequence[Sequence[bytes]]) -> list[bytes]:
    """For each pair the smallest key in its component (union-find over keys)."""
    parent: dict[bytes, bytes] = {}

    def find(key: bytes) -> bytes:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = parent[key]
        return key

    for keys in members:
        roots = [find(key) for key in keys]
        least = min(roots)
        for root in roots:
            parent[root] = least
    return [find(keys[0]) for keys in members]
