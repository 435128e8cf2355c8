"""Graphics cards: memory, and the rates by which counted work becomes time.

Rates of a card that is not here are its maker's figures (dense bf16 matrix products with fp32 accumulation,
memory bandwidth, PCIe in one direction) times what kernels are assumed to attain of them. Those of this
machine's card are measured: `rates.py`.

Where a card multiplies fp8, its figure with fp32 accumulation is twice that of bf16: 330.3 and 165.2 TFLOPS
of the RTX 4090 (NVIDIA Ada GPU Architecture v2.02, appendix A), 419 and 209.5 of the RTX 5090 (NVIDIA RTX
Blackwell GPU Architecture), 1979 and 989 of the H100 SXM (data sheet). On GeForce cards both are half of what
fp16 accumulation gives: the RTX 4090's 660.6, also quoted for fp8, is that.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB
from mapo_kernels.capability import OLDEST_FP8_CAPABILITY


class Rates(NamedTuple):
    """What a card's kernels attain."""

    matrix: float
    """Floating-point operations per second of matrix products; likewise the next three."""
    fp8: float
    """Of products in fp8; `matrix` where the card has none."""
    convolution: float
    attention: float
    memory: float
    """Bytes per second that elementwise kernels read and write."""
    fetch: float
    """Bytes per second from pinned host memory."""
    store: float
    """Bytes per second to it."""
    launch: float
    """Seconds that a kernel takes at least on the device."""
    host: float
    """Seconds that Python and the dispatcher need to issue an operation."""
    source: str
    """Where the figures come from, for people."""


class Card(NamedTuple):
    """One card."""

    name: str
    gib: float
    capability: int
    """Compute capability as one number, 89 for 8.9."""
    rates: Rates
    kernels: bool = True
    """Whether our Triton kernels run on it; else their operators run in eager PyTorch."""


def _card(name: str, gib: float, capability: int, tflops: float, gbps: float, pcie_gbps: float) -> Card:
    """By the maker's figures. The shares of them, and the last two times, are assumed."""
    return Card(
        name,
        gib,
        capability,
        Rates(
            matrix=0.65e12 * tflops,
            fp8=0.65e12 * tflops * (2 if capability >= OLDEST_FP8_CAPABILITY else 1),
            convolution=0.5e12 * tflops,
            attention=0.5e12 * tflops,
            memory=0.8e9 * gbps,
            fetch=0.8e9 * pcie_gbps,
            store=0.8e9 * pcie_gbps,
            launch=3e-6,
            host=9e-6,
            source=f"assumed from the maker's figures for {name}",
        ),
    )


CARDS = (
    _card("RTX 3050 4GB", 4, 86, 12.3, 192, 16),  # the laptop's; PCIe 4.0 x8, as of the other two
    _card("RTX 3050 6GB", 6, 86, 13.5, 168, 16),
    _card("RTX 2060 6GB", 6, 75, 25.8, 336, 16),
    _card("RTX 3050 8GB", 8, 86, 18.2, 224, 16),
    _card("RTX 3060 8GB", 8, 86, 25.5, 240, 32),
    _card("RTX 4060", 8, 89, 30.2, 272, 16),
    _card("RTX 4060 Ti 8GB", 8, 89, 44.1, 288, 16),
    _card("RTX 5060 Ti 8GB", 8, 120, 47.4, 448, 32),
    _card("RTX 3080 10GB", 10, 86, 59.5, 760, 32),
    _card("RTX 2060 12GB", 12, 75, 28.7, 336, 16),
    _card("RTX 3060 12GB", 12, 86, 25.5, 360, 32),
    _card("RTX 3080 12GB", 12, 86, 61.3, 912, 32),
    _card("RTX 4070 Ti", 12, 89, 80.2, 504, 32),
    _card("RTX 4060 Ti 16GB", 16, 89, 44.1, 288, 16),
    _card("RTX 5060 Ti 16GB", 16, 120, 47.4, 448, 32),
    _card("RTX 4080", 16, 89, 97.5, 717, 32),
    _card("RTX 3090", 24, 86, 71.0, 936, 32),
    _card("RTX 4090", 24, 89, 165.2, 1008, 32),
    _card("RTX 5090", 32, 120, 209.5, 1792, 64),
    _card("A100 40GB", 40, 80, 312, 1555, 32),
    _card("A100 80GB", 80, 80, 312, 2039, 32),
    _card("H100 80GB", 80, 90, 989, 3350, 64),
    _card("H100 94GB", 94, 90, 835, 3938, 64),  # NVL
    _card("H200", 141, 90, 989, 4800, 64),
)

_SIZE = r"(\d+(?:\.\d+)?)\s*gi?b"

CONTEXT_GIB = 0.4
"""The CUDA context with its modules, which are loaded when they are first needed."""
WORKSPACE_GIB = 0.15
"""GiB of cuDNN's workspace, which torch's allocator holds while a convolution runs."""


def usable_bytes(vram: int) -> int:
    """What a plan may reserve with this much free memory, beside the CUDA context and workspaces."""
    return int(vram - (CONTEXT_GIB + WORKSPACE_GIB) * GIB)


def vram_for(reserved: int) -> int:
    """The least free memory for a plan that reserves this much: the inverse of `usable_bytes`."""
    return int(reserved + (CONTEXT_GIB + WORKSPACE_GIB) * GIB) + 1


def find_card(name: str) -> Card:
    """The card of this name: upper or lower case, with or without maker and, where there is one, memory size.

    Raises:
        UserError: unknown, with the nearest names; made with several sizes, of which none or another is
            named; or a laptop's without its memory, of which the desktop's of that name has more.
    """
    size = re.search(_SIZE, name.lower())
    alike = [card for card in CARDS if _plain(card.name) == _plain(name)]
    fitting = [card for card in alike if size is not None and card.gib == float(size[1])]
    if re.search(r"laptop|mobile|max-q", name.lower()):
        return _laptop(name, size, fitting or alike)
    if len(alike) > 1 and not fitting:
        sizes = " or ".join(f"{card.gib:g}" for card in alike)
        raise UserError(
            f'--card {name!r} is made with {sizes} GB: say which, as in --card "{alike[-1].name}"'
        )
    if not alike:
        raise _unknown(name)
    (card,) = fitting or alike
    return card if size is None else card._replace(gib=float(size[1]))


def _laptop(name: str, size: re.Match[str] | None, alike: list[Card]) -> Card:
    """One with the rates of the slowest desktop card of its name."""
    if not alike:
        raise _unknown(name)
    if size is None:
        raise UserError(f'--card {name!r}: say how much memory the laptop\'s has, as in "{name} 6GB"')
    card = min(alike, key=lambda card: card.rates.matrix)
    source = f"{card.rates.source}, the desktop's: a laptop's is slower"
    return card._replace(gib=float(size[1]), rates=card.rates._replace(source=source))


def _unknown(name: str) -> UserError:
    known = {_plain(card.name): card.name for card in CARDS}
    near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(known[n] for n in near)}?"
        if near
        else f"known: {', '.join(card.name for card in CARDS)}."
    )
    return UserError(f"--card {name!r} is not known; {hint} Any other card: --vram with its memory")


def card_with(vram: int, capability: int = 0) -> Card:
    """The slowest of the known cards that have this much memory, or of the largest ones.

    Args:
        capability: that it has at least.
    """
    able = [card for card in CARDS if card.capability >= capability]
    enough = [card for card in able if card.gib * GIB >= vram * 0.97]
    smallest = min((card.gib for card in enough), default=max(card.gib for card in able))
    return min((c for c in able if c.gib == smallest), key=lambda card: card.rates.matrix)


def _plain(name: str) -> str:
    """The name's telling words, without the memory's size."""
    words = re.findall(r"[a-z0-9]+", re.sub(_SIZE, " ", name.lower()).replace("rtx", " "))
    dull = r"nvidia|geforce|laptop|mobile|max|q|gpu|pcie|nvl|sxm\d*|hbm\d*e?"
    return "".join(word for word in words if not re.fullmatch(dull, word))
