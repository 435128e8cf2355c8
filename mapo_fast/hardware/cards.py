"""Graphics cards: memory, and the rates by which counted work becomes time.

Rates of a card that is not in this machine are its maker's figures (dense bf16 matrix products with fp32
accumulation, memory bandwidth, PCIe in one direction) times what kernels are assumed to attain of them. Those
of this machine's card are measured: `planner/rates.py`.

The makers' figures for matrix products: GeForce cards have twice their fp32 figure, the 20 series four times
(NVIDIA's papers on Turing, Ampere GA102, Ada and RTX Blackwell, appendix A). Other cards have those of their
data sheets, halved where they are for sparse matrices. A laptop's is its cores at the highest boost clock of
NVIDIA's comparison table; a lower power limit makes it slower, and the source says so.

Where a card multiplies fp8, its figure with fp32 accumulation is twice that of bf16: 330.3 and 165.2 TFLOPS
of the RTX 4090 (NVIDIA Ada GPU Architecture v2.02, appendix A), 419 and 209.5 of the RTX 5090 (NVIDIA RTX
Blackwell GPU Architecture), 1979 and 989 of the H100 SXM (data sheet). On GeForce cards both are half of what
fp16 accumulation gives: the RTX 4090's 660.6, also quoted for fp8, is that.
"""

from __future__ import annotations

from typing import NamedTuple

from mapo_fast.util.sizes import GIB
from mapo_kernels.capability import OLDEST_FP8_CAPABILITY


class Rates(NamedTuple):
    """Rates that a card's kernels attain."""

    matrix: float
    """Floating-point operations per second of matrix products in half precision."""
    fp8: float
    """Floating-point operations per second of fp8 products; `matrix` where the card has none."""
    convolution: float
    """Floating-point operations per second of convolutions."""
    attention: float
    """Floating-point operations per second of attention."""
    memory: float
    """Bytes per second that elementwise kernels read and write."""
    fetch: float
    """Bytes per second from pinned host memory."""
    store: float
    """Bytes per second to pinned host memory."""
    launch: float
    """Least seconds that a kernel takes on the device."""
    host: float
    """Seconds that Python and the dispatcher need to issue an operation."""
    source: str
    """Where the figures come from, as text."""


class Card(NamedTuple):
    """One card."""

    name: str
    gib: float
    capability: int
    """Compute capability as one number, 89 for 8.9."""
    rates: Rates
    kernels: bool = True
    """Whether our Triton kernels run on it; else their operators run in eager PyTorch."""
    kind: str = "other"


DESKTOP, LAPTOP, OTHER = "desktop", "laptop", "other"
"""Kinds of cards: GeForce for desktops, GeForce in laptops, professional and data-centre cards."""


def _card(
    name: str, gib: float, capability: int, tflops: float, gbps: float, pcie_gbps: float, kind: str = DESKTOP
) -> Card:
    """A card from the maker's figures. The attained shares of them and the last two times are assumed."""
    source = f"assumed from the maker's figures for {name}"
    if kind == LAPTOP:
        source += ": one with a lower power limit is slower"
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
            source=source,
        ),
        kind=kind,
    )


CARDS = (
    _card("RTX 3050 4GB", 4, 86, 12.3, 192, 16),  # in laptops only; PCIe 4.0 x8, as of the other two
    _card("RTX 3050 6GB", 6, 86, 13.5, 168, 16),
    _card("RTX 2060 6GB", 6, 75, 25.8, 336, 16),
    _card("RTX 3050 8GB", 8, 86, 18.2, 224, 16),
    _card("RTX 3060 8GB", 8, 86, 25.5, 240, 32),
    _card("RTX 5050", 8, 120, 26.3, 320, 32),
    _card("RTX 2060 SUPER", 8, 75, 28.7, 448, 16),
    _card("RTX 2070", 8, 75, 29.9, 448, 16),
    _card("RTX 4060", 8, 89, 30.2, 272, 16),
    _card("RTX 3060 Ti", 8, 86, 32.4, 448, 32),
    _card("RTX 2070 SUPER", 8, 75, 36.2, 448, 16),
    _card("RTX 5060", 8, 120, 38.4, 448, 32),
    _card("RTX 2080", 8, 75, 40.3, 448, 16),
    _card("RTX 3070", 8, 86, 40.6, 448, 32),
    _card("RTX 3070 Ti", 8, 86, 43.5, 608, 32),
    _card("RTX 4060 Ti 8GB", 8, 89, 44.1, 288, 16),
    _card("RTX 2080 SUPER", 8, 75, 44.6, 496, 16),
    _card("RTX 5060 Ti 8GB", 8, 120, 47.4, 448, 32),
    _card("RTX 3080 10GB", 10, 86, 59.5, 760, 32),
    _card("RTX 2080 Ti", 11, 75, 53.8, 616, 16),
    _card("RTX 2060 12GB", 12, 75, 28.7, 336, 16),
    _card("RTX 3060 12GB", 12, 86, 25.5, 360, 32),
    _card("RTX 4070", 12, 89, 58.3, 504, 32),
    _card("RTX 3080 12GB", 12, 86, 61.3, 912, 32),
    _card("RTX 5070", 12, 120, 61.7, 672, 64),
    _card("RTX 3080 Ti", 12, 86, 68.2, 912, 32),
    _card("RTX 4070 SUPER", 12, 89, 71.0, 504, 32),
    _card("RTX 4070 Ti", 12, 89, 80.2, 504, 32),
    _card("RTX 4060 Ti 16GB", 16, 89, 44.1, 288, 16),
    _card("RTX 5060 Ti 16GB", 16, 120, 47.4, 448, 32),
    _card("RTX 5070 Ti", 16, 120, 87.9, 896, 64),
    _card("RTX 4070 Ti SUPER", 16, 89, 88.2, 672, 32),
    _card("RTX 4080", 16, 89, 97.5, 717, 32),
    _card("RTX 4080 SUPER", 16, 89, 104.4, 736, 32),
    _card("RTX 5080", 16, 120, 112.6, 960, 64),
    _card("RTX 3090", 24, 86, 71.0, 936, 32),
    _card("RTX 3090 Ti", 24, 86, 80.0, 1008, 32),
    _card("RTX 4090", 24, 89, 165.2, 1008, 32),
    _card("RTX 5090", 32, 120, 209.5, 1792, 64),
    _card("RTX 3050 Laptop 4GB", 4, 86, 14.3, 192, 16, LAPTOP),
    _card("RTX 3050 Ti Laptop", 4, 86, 17.4, 192, 16, LAPTOP),
    _card("RTX 3050 Laptop 6GB", 6, 86, 15.3, 168, 16, LAPTOP),
    _card("RTX 2060 Laptop", 6, 75, 24.0, 336, 16, LAPTOP),
    _card("RTX 4050 Laptop", 6, 89, 24.3, 192, 16, LAPTOP),
    _card("RTX 3060 Laptop", 6, 86, 26.2, 336, 32, LAPTOP),
    _card("RTX 2070 Laptop", 8, 75, 26.5, 448, 16, LAPTOP),
    _card("RTX 5050 Laptop", 8, 120, 27.3, 384, 32, LAPTOP),
    _card("RTX 4060 Laptop", 8, 89, 29.1, 256, 16, LAPTOP),
    _card("RTX 3070 Laptop", 8, 86, 33.2, 448, 32, LAPTOP),
    _card("RTX 5060 Laptop", 8, 120, 33.2, 384, 32, LAPTOP),
    _card("RTX 3070 Ti Laptop", 8, 86, 35.0, 448, 32, LAPTOP),
    _card("RTX 2080 Laptop", 8, 75, 37.4, 448, 16, LAPTOP),
    _card("RTX 4070 Laptop", 8, 89, 40.1, 256, 16, LAPTOP),
    _card("RTX 3080 Laptop 8GB", 8, 86, 42.0, 448, 32, LAPTOP),
    _card("RTX 5070 Laptop", 8, 120, 43.3, 384, 32, LAPTOP),
    _card("RTX 5070 Ti Laptop", 12, 120, 52.3, 672, 64, LAPTOP),
    _card("RTX 4080 Laptop", 12, 89, 67.7, 432, 32, LAPTOP),
    _card("RTX 3080 Laptop 16GB", 16, 86, 42.0, 448, 32, LAPTOP),
    _card("RTX 3080 Ti Laptop", 16, 86, 47.2, 512, 32, LAPTOP),
    _card("RTX 5080 Laptop", 16, 120, 70.3, 896, 64, LAPTOP),
    _card("RTX 4090 Laptop", 16, 89, 79.4, 576, 32, LAPTOP),
    _card("RTX 5090 Laptop", 24, 120, 90.7, 896, 64, LAPTOP),
    _card("RTX A2000 6GB", 6, 86, 32, 288, 32, OTHER),
    _card("RTX A2000 12GB", 12, 86, 32, 288, 32, OTHER),
    _card("RTX 2000 Ada", 16, 89, 48, 224, 16, OTHER),
    _card("RTX A4000", 16, 86, 76.7, 448, 32, OTHER),
    _card("RTX A4500", 20, 86, 94.6, 640, 32, OTHER),
    _card("RTX 4000 Ada", 20, 89, 106.9, 360, 32, OTHER),
    _card("RTX A5000", 24, 86, 111.1, 768, 32, OTHER),
    _card("RTX A5500", 24, 86, 136.4, 768, 32, OTHER),
    _card("RTX 4500 Ada", 24, 89, 158.5, 432, 32, OTHER),
    _card("RTX 5000 Ada", 32, 89, 261.1, 576, 32, OTHER),
    _card("RTX A6000", 48, 86, 154.8, 768, 32, OTHER),
    _card("RTX 6000 Ada", 48, 89, 364.2, 960, 32, OTHER),
    _card("RTX PRO 6000", 96, 120, 503.8, 1792, 64, OTHER),  # the workstation's, Blackwell
    _card("T4", 16, 75, 65, 320, 16, OTHER),
    _card("A10G", 24, 86, 70, 600, 32, OTHER),
    _card("L4", 24, 89, 121, 300, 32, OTHER),
    _card("A10", 24, 86, 125, 600, 32, OTHER),
    _card("A40", 48, 86, 149.7, 696, 32, OTHER),
    _card("L40", 48, 89, 181, 864, 32, OTHER),
    _card("L40S", 48, 89, 362, 864, 32, OTHER),
    _card("A100 40GB", 40, 80, 312, 1555, 32, OTHER),
    _card("A100 80GB", 80, 80, 312, 2039, 32, OTHER),
    _card("H100 80GB", 80, 90, 989, 3350, 64, OTHER),
    _card("H100 94GB", 94, 90, 835, 3938, 64, OTHER),  # NVL
    _card("H200", 141, 90, 989, 4800, 64, OTHER),
)

CONTEXT_GIB = 0.4
"""GiB of the CUDA context with its modules, which are loaded when they are first needed."""
WORKSPACE_GIB = 0.15
"""GiB of cuDNN's workspace, which torch's allocator holds while a convolution runs."""


def usable_bytes(vram: int) -> int:
    """Bytes that a plan may reserve with this much free memory, after the CUDA context and workspaces."""
    return int(vram - (CONTEXT_GIB + WORKSPACE_GIB) * GIB)


def vram_for(reserved: int) -> int:
    """The least free memory for a plan that reserves this much: the inverse of `usable_bytes`."""
    return int(reserved + (CONTEXT_GIB + WORKSPACE_GIB) * GIB) + 1


def card_with(vram: int, capability: int = 0) -> Card:
    """The slowest of the known cards that have this much memory, or of the largest ones; GeForce cards first.

    Args:
        capability: least compute capability of the card.
    """
    able = [card for card in CARDS if card.capability >= capability and card.kind != LAPTOP]
    enough = [card for card in able if card.gib * GIB >= vram * 0.97]
    smallest = min((card.gib for card in enough), default=max(card.gib for card in able))
    alike = [card for card in able if card.gib == smallest]
    return min(alike, key=lambda card: (card.kind != DESKTOP, card.rates.matrix))
