"""A user's question to the planner: looked up in the shipped table, or computed.

Nothing here imports torch before something has to be computed.
"""

from __future__ import annotations

from collections.abc import Callable

from mapo_fast.hardware.cards import Card, card_with
from mapo_fast.hardware.holders import gpus
from mapo_fast.hardware.host import host
from mapo_fast.hardware.names import find_card
from mapo_fast.planner import shipped
from mapo_fast.planner.capability import OLDEST_BF16, least_capability
from mapo_fast.planner.plan import PlanResult
from mapo_fast.settings.fp8 import refuse_card_without_fp8
from mapo_fast.settings.load import expect_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, parse_size

RAM = "32GiB"
"""Default free system RAM of the machine that a plan is for."""


def plan(
    config: Config,
    *,
    card: str | None = None,
    vram: str | None = None,
    ram: str = RAM,
    model: str | None = None,
    traced: bool = False,
    progress: Callable[[int, int], None] = lambda made, asked: None,
) -> PlanResult:
    """Find the fastest plan for `config` that fits a card; no GPU and no weights are needed.

    Presets on known cards and sizes of memory are looked up. Other questions take a minute or two, the first
    time for a model and settings.

    Args:
        config: its settings are kept, and those of the memory plan that it leaves open are chosen.
        card: such as "RTX 4090"; where nothing else says how much memory there is, this machine's.
        vram: GPU memory, such as "24GiB", in place of the card's and of `train.vram`.
        ram: free system memory, such as "64GiB"; 32 GiB by default, whatever this machine has.
        model: "sdxl", or a model in place of `model.path`.
        traced: compute it in any case: a plan that is looked up has no trace.
        progress: told how many training steps are traced, of how many.

    Returns:
        The plan, which `result.chosen.apply(config)` puts into a config, and what it was chosen from.
        `chosen` is None where nothing fits, and `advice` then says what would.

    Raises:
        UserError: an unknown card or model, neither a card nor a size of its memory, a size that is none,
            settings that the card cannot do.
    """
    expect_config(config)
    assumed, nbytes = card_and_memory(config, card, vram)
    limits = host(parse_size(ram, "--ram"))
    model = model or str(config.model.path)
    if model.lower() == "sdxl" and not traced:
        known = shipped.find(config, assumed, nbytes, limits)
        if known is not None:
            return known
    from mapo_fast.planner import ask

    return ask.compute(config, assumed, nbytes, limits, model, traced=traced, progress=progress)


def card_and_memory(config: Config, card: str | None, vram: str | None) -> tuple[Card, int]:
    """The card to plan for, and its bytes of memory; raises as `plan`."""
    if not (card or vram or config.train.vram):
        card = name_of_local_card()
    found = find_card(card) if card else None
    sizes = [] if config.train.vram is None else [parse_size(config.train.vram, "train.vram")]
    sizes += [] if found is None else [int(found.gib * GIB)]
    if vram:
        sizes = [parse_size(vram, "--vram")]
    if not sizes:
        raise UserError('say which card: --card "RTX 4090", or --vram 24')
    nbytes = min(sizes)  # a run has no more than its card either
    assumed = found or card_with(nbytes, least_capability(config))
    if "bf16" in config.train.precision and assumed.capability < OLDEST_BF16:
        raise UserError(
            f"{assumed.name} cannot do bf16 (train.precision = {config.train.precision!r}): use 'fp16' with "
            "adapter.kind = 'lora', or 'fp32'"
        )
    refuse_card_without_fp8(config, assumed.name, assumed.capability)
    return assumed, nbytes


def name_of_local_card() -> str | None:
    """This machine's first GPU with its memory; None without one, or without NVML."""
    local = next(iter(gpus()), None)
    return None if local is None else f"{local.name} {local.total / GIB:.0f}GB"
