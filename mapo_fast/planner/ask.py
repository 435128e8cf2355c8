"""Questions to the planner: a user's, and that of a run that is about to start."""

from __future__ import annotations

import torch

from mapo_fast.engine.compile import refuse_without_triton
from mapo_fast.engine.fp8 import capability_for, refuse_card_without_fp8, refuse_without_fp8
from mapo_fast.engine.graphs import check_capture
from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.cards import Card, card_with
from mapo_fast.hardware.gpu import planned_rules
from mapo_fast.hardware.host import host
from mapo_fast.hardware.names import find_card
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.planner.models import parts_of
from mapo_fast.planner.plan import PlanResult
from mapo_fast.planner.rates import rates_of
from mapo_fast.planner.search import search
from mapo_fast.planner.stages import vae_of
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, parse_size, size_text
from mapo_kernels import backend

RAM = "32GiB"
"""Free system RAM of the machine that a plan is for, where nobody says."""


def plan(
    config: Config,
    *,
    card: str | None = None,
    vram: str | None = None,
    ram: str = RAM,
    model: str | None = None,
) -> PlanResult:
    """Find the fastest way to train as `config` says that fits a card; no GPU and no weights are needed.

    The first time for a model and settings this takes a minute or two.

    Args:
        config: its settings are kept, and those of the memory plan that it leaves open are chosen.
        card: such as "RTX 4090".
        vram: GPU memory, such as "24GiB", in place of the card's and of `train.vram`.
        ram: free system memory, such as "64GiB"; 32 GiB by default, whatever this machine has.
        model: "sdxl", or a model in place of `model.path`.

    Returns:
        The plan, which `result.chosen.apply(config)` puts into a config, and what it was chosen from.
        `chosen` is None where nothing fits, and `advice` then says what would.

    Raises:
        UserError: an unknown card or model, neither a card nor a size of its memory, a size that is none,
            settings that the card cannot do.
    """
    found = find_card(card) if card else None
    sizes = [] if config.train.vram is None else [parse_size(config.train.vram, "train.vram")]
    sizes += [] if found is None else [int(found.gib * GIB)]
    if vram:
        sizes = [parse_size(vram, "--vram")]
    if not sizes:
        raise UserError('say which card: --card "RTX 4090", or --vram 24GiB')
    nbytes = min(sizes)  # a run has no more than its card either
    limits = host(parse_size(ram, "--ram"))
    chosen = found or card_with(nbytes, _capability(config))
    _refuse_without_bf16(config, chosen)
    refuse_card_without_fp8(config, chosen.name, chosen.capability)
    config, unet, vae = parts_of(model or str(config.model.path), config)
    return search(config, unet, chosen, nbytes, limits, vae=vae, rules=planned_rules())


def plan_run(
    config: Config,
    folder: Pipeline,
    vram: int,
    device: torch.device,
    processes: int = 1,
    rules: Rules = EXPANDABLE,
) -> PlanResult:
    """Plan for a run on this machine.

    Args:
        folder: of the model; no weights are read.
        vram: bytes that the run may use.
        device: a GPU's rates are measured, once.
        processes: those that share this machine's RAM.
        rules: of torch's allocator.

    Raises:
        UserError: the GPU cannot do what the settings ask for.
    """
    refuse_without_fp8(config, device)
    refuse_without_triton(config, device)
    check_capture(config, device)
    card = card_of(device) if device.type == "cuda" else card_with(vram, _capability(config))
    limits = host(None, processes)
    return search(config, folder.config("unet"), card, vram, limits, vae=vae_of(folder), rules=rules)


def refusal(outcome: PlanResult, source: str) -> str:
    """Why nothing fits into what `source` gives, and what would, in one line."""
    enough = f'; train.vram = "{size_text(outcome.enough)}" would do' if outcome.enough else ""
    usable = max(0, outcome.usable) / GIB
    return (
        f"no plan fits {source}, {outcome.vram / GIB:.2f} GiB ({usable:.2f} beside the CUDA "
        f"context and workspaces): {outcome.advice}{enough}"
    )


def card_of(device: torch.device) -> Card:
    """This machine's GPU, with measured rates; where that fails with assumed ones, of which the source tells.

    One that is not known is then taken for the slowest with as much memory.
    """
    name, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    total, capability = properties.total_memory, 10 * properties.major + properties.minor
    kernels = backend(device).name == "triton"
    try:
        return Card(name, total / GIB, capability, rates_of(device), kernels)
    except Exception as error:  # whatever it is, a run does not depend on it
        why = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        card = find_card(name if "GB" in name else f"{name} {total / GIB:.0f}GB")
    except UserError:
        card = card_with(total)
    rates = card.rates._replace(source=f"{card.rates.source}: not measured ({why})")
    return card._replace(capability=capability, rates=rates, kernels=kernels)


_WITHOUT_BF16 = 80
"""The compute capability below which a card does not compute in bf16."""


def _capability(config: Config) -> int:
    """The least compute capability that the settings need, 89 for 8.9."""
    return max(capability_for(config), _WITHOUT_BF16 if "bf16" in config.train.precision else 0)


def _refuse_without_bf16(config: Config, card: Card) -> None:
    if "bf16" in config.train.precision and card.capability < _WITHOUT_BF16:
        raise UserError(
            f"{card.name} cannot do bf16 (train.precision = {config.train.precision!r}): use 'fp16' with "
            "adapter.kind = 'lora', or 'fp32'"
        )
