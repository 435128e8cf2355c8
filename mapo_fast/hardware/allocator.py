"""torch's caching allocator for CUDA, replayed: what a sequence of allocations makes it reserve.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.11 to 2.13), for one stream:

- A size is rounded up to 512 bytes. Up to 1 MiB it comes from the small pool, above from the large one.
- The smallest free block that is large enough is taken. The rest of it is split off: in the small pool and in
  expandable segments from 512 bytes on, in the large pool if it is more than 1 MiB.
- Where no block is free, a segment is made: 2 MiB in the small pool; 20 MiB below 10 MiB; above the size
  itself, rounded up to 2 MiB. Were that more than the cap, all free segments are given back first.
- An expandable segment grows by pages of 2 MiB (small pool) or 20 MiB (large pool), after the free memory at
  its end; free pages anywhere in it can be given back.
- A freed block is merged with free neighbours.
- A CUDA graph's pool is apart, and nothing of it is given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

MIB = 2**20
SMALLEST = 512
SMALL = MIB
"""The largest size of the small pool."""
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
EXACT = 10 * MIB
"""Bytes from which a segment is as large as the request."""
_PAGES = 1 << 24
"""Pages that an expandable segment's addresses span: more than a card has."""


class CapReachedError(Exception):
    """The cap is reached."""


class Rules(NamedTuple):
    """The allocator's own settings that change what it reserves."""

    expandable: bool = False
    max_split: int | None = None
    """Bytes from which blocks are neither split nor used for smaller sizes."""
    divisions: int = 1
    """Parts of each power of two that sizes are rounded up to."""
    segment: int = LARGE_SEGMENT
    """Bytes of a segment for sizes from 1 to 10 MiB, and of an expandable segment's pages."""
    rounding: int = LARGE_SEGMENT
    """Bytes by which a block of `max_split` or more may be larger than the request."""


EXPANDABLE = Rules(expandable=True)
"""The allocator's rules in a run on Linux."""


class Block:
    """A range of addresses, in use or free; unmapped where an expandable segment has no memory."""

    __slots__ = ("address", "after", "before", "expandable", "free", "mapped", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int, *, expandable: bool = False) -> None:
        self.pool, self.address, self.size, self.expandable = pool, address, size, expandable
        self.free = True
        self.mapped = not expandable
        self.before: Block | None = None
        self.after: Block | None = None


class _Pool:
    """Free blocks by size and address; unmapped ones by address."""

    def __init__(self, *, small: bool, private: bool) -> None:
        self.small, self.private = small, private
        self.blocks: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def add(self, block: Block) -> None:
        if block.mapped:
            insort(self.blocks, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        if block.mapped:
            del self.blocks[bisect_left(self.blocks, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class CachingAllocator:
    """Replays allocations; nothing is allocated.

    Args:
        rules: the settings.
        cap: most bytes to reserve, as set by `set_per_process_memory_fraction`; None: no limit.
    """

    def __init__(self, rules: Rules, cap: int | None = None) -> None:
        self.rules, self.cap = rules, cap
        self.reserved = 0
        self.peak = 0
        """Most bytes that were ever reserved."""
        self._pools = {
            (small, private): _Pool(small=small, private=private)
            for small in (True, False)
            for private in (True, False)
        }
        self._addresses = rules.segment * _PAGES
        self._next = self._addresses
        """Address of the next segment."""

    def malloc(self, nbytes: int, *, private: bool = False) -> Block:
        """A block of this size.

        Args:
            private: from the pool of CUDA graphs, as in a capture.

        Raises:
            CapReachedError: the cap would be exceeded, even after all free segments were given back.
        """
        size = self._rounded(nbytes)
        pool = self._pools[size <= SMALL, private]
        block = self._best(pool, size) or self._made(pool, size)
        if block is None and not private:
            self.release()
            block = self._made(pool, size)
        if block is None:
            raise CapReachedError
        rest = block.size - size
        if rest >= SMALLEST if pool.small or self.rules.expandable else self._splits(size, rest):
            block = self._split(block, size)
        block.free = False
        return block

    def free(self, block: Block) -> None:
        """Give a block back."""
        block.free = True
        self._merge(block, block.before)
        self._merge(block, block.after)
        block.pool.add(block)

    def release(self) -> None:
        """Give free segments, and free pages of expandable ones, back to the driver."""
        for (_, private), pool in self._pools.items():
            if private:
                continue
            for _, _, block in list(pool.blocks):
                if block.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _rounded(self, nbytes: int) -> int:
        size = max(SMALLEST, -(-nbytes // SMALLEST) * SMALLEST)
        divisions = self.rules.divisions
        if divisions > 1 and nbytes > SMALLEST * divisions:
            part = (1 << (nbytes.bit_length() - 1)) // divisions
            size = -(-nbytes // part) * part
        return size

    def _splits(self, size: int, rest: int) -> bool:
        return rest > SMALL and (self.rules.max_split is None or size < self.rules.max_split)

    def _best(self, pool: _Pool, size: int) -> Block | None:
        """The smallest free block that is large enough, out of the pool."""
        i = bisect_left(pool.blocks, (size,))
        if i == len(pool.blocks):
            return None
        block = pool.blocks[i][2]
        while block.expandable and i + 1 < len(pool.blocks):
            # The free end of an expandable segment counts with all that it can grow.
            following = pool.blocks[i + 1][2]
            if _can_grow_to(following) >= _can_grow_to(block):
                break
            i, block = i + 1, following
        limit = self.rules.max_split
        if limit is not None and (
            (size < limit <= block.size) or (size >= limit and block.size >= size + self.rules.rounding)
        ):
            return None
        pool.remove(block)
        return block

    def _made(self, pool: _Pool, size: int) -> Block | None:
        """A free block in a new segment, or at an expandable one's end; None where the cap is reached."""
        segment = SMALL_SEGMENT if pool.small else self.rules.segment if size < EXACT else _up(size, 2 * MIB)
        if self.cap is not None and self.reserved + segment > self.cap:
            return None
        if self.rules.expandable:
            return self._grown(pool, size)
        self._reserve(segment)
        block = Block(pool, self._next, segment)
        self._next += segment
        return block

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)

    def _grown(self, pool: _Pool, size: int) -> Block:
        """The lowest free range in the pool's expandable segment, with memory mapped to it."""
        block = next((room for room in map(_room, pool.unmapped) if _fits(room, size)), None)
        if block is None:
            block = Block(pool, self._next, self._addresses, expandable=True)
            self._next += self._addresses
            pool.add(block)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            after = block.after
            assert after is not None
            block = self._map(after, min(size - block.size, after.size))
        pool.remove(block)
        return block

    def _map(self, block: Block, nbytes: int) -> Block:
        """Put pages under the beginning of an unmapped block; returns it, merged with free neighbours."""
        pool = block.pool
        pages = _up(nbytes, SMALL_SEGMENT if pool.small else self.rules.segment)
        pool.remove(block)
        block.mapped = True
        if pages < block.size:
            rest = Block(pool, block.address + pages, block.size - pages, expandable=True)
            _link(block, rest, block.after)
            block.size = pages
            pool.add(rest)
        self._merge(block, block.before)
        self._merge(block, block.after)
        pool.add(block)
        self._reserve(pages)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the whole pages of a free block away."""
        pool = block.pool
        page = SMALL_SEGMENT if pool.small else self.rules.segment
        begin, end = _up(block.address, page), (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        self.reserved -= end - begin
        if begin > block.address:
            head = self._piece(block, block.address, begin - block.address)
            _link(block.before, head, block)
        if end < block.address + block.size:
            tail = self._piece(block, end, block.address + block.size - end)
            _link(block, tail, block.after)
        block.address, block.size, block.mapped = begin, end - begin, False
        self._merge(block, block.before)
        self._merge(block, block.after)
        pool.add(block)

    def _piece(self, block: Block, address: int, size: int) -> Block:
        piece = Block(block.pool, address, size, expandable=block.expandable)
        piece.mapped = True
        block.pool.add(piece)
        return piece

    def _split(self, block: Block, size: int) -> Block:
        """The first `size` bytes of a block; the rest goes to the pool."""
        rest = self._piece(block, block.address + size, block.size - size)
        _link(block, rest, block.after)
        block.size = size
        return block

    def _merge(self, block: Block, other: Block | None) -> None:
        """Add a free neighbour to a block that is in no list."""
        if other is None or not other.free or other.mapped != block.mapped:
            return
        other.pool.remove(other)
        if other is block.before:
            block.address = other.address
            block.before = other.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = other.after
            if block.after is not None:
                block.after.before = block
        block.size += other.size


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _link(before: Block | None, block: Block, after: Block | None) -> None:
    """Put a block between two neighbours."""
    block.before, block.after = before, after
    if before is not None:
        before.after = block
    if after is not None:
        after.before = block


def _can_grow_to(block: Block) -> int:
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _room(entry: tuple[int, Block]) -> Block:
    """An unmapped block, or the free one in front of it."""
    block = entry[1]
    return block.before if block.before is not None and block.before.free else block


def _fits(block: Block | None, size: int) -> bool:
    """Whether free and unmapped blocks from this one on are large enough together."""
    found = 0
    while block is not None and block.free and found < size:
        found += block.size
        block = block.after
    return found >= size
