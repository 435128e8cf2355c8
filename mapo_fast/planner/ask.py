"""Plans that have to be computed: for a user's question, and for a run that is about to start."""

from __future__ import annotations

import torch

from mapo_fast.engine.compile import refuse_without_triton
from mapo_fast.engine.fp8 import refuse_without_fp8
from mapo_fast.engine.graphs import check_capture
from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.cards import Card, card_with
from mapo_fast.hardware.gpu import planned_rules
from mapo_fast.hardware.host import Host, host
from mapo_fast.hardware.names import find_card
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.planner import shipped
from mapo_fast.planner.capability import least_capability
from mapo_fast.planner.models import parts_of, unet_of
from mapo_fast.planner.plan import PlanResult
from mapo_fast.planner.rates import rates_of
from mapo_fast.planner.search import search
from mapo_fast.planner.stages import SDXL_VAE, vae_of
from mapo_fast.planner.store import Progress, no_progress
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, size_text
from mapo_kernels import backend


def compute(
    config: Config,
    card: Card,
    vram: int,
    limits: Host,
    model: str,
    *,
    traced: bool = False,
    progress: Progress = no_progress,
) -> PlanResult:
    """Plan for a card that need not be in this machine; for a model like SDXL the table is asked first.

    Args:
        model: "sdxl", or a model's file or folder.
        traced: do not ask the table.
        progress: told how many traces are made, of how many.
    """
    config, unet, vae = parts_of(model, config)
    if unet is SDXL_UNET and vae is SDXL_VAE and not traced:
        known = shipped.find(config, card, vram, limits)
        if known is not None:
            return known
    return search(config, unet, card, vram, limits, vae=vae, rules=planned_rules(), progress=progress)


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
        UserError: the GPU does not support a setting.
    """
    refuse_without_fp8(config, device)
    refuse_without_triton(config, device)
    check_capture(config, device)
    card = card_of(device) if device.type == "cuda" else card_with(vram, least_capability(config))
    limits = host(None, processes)
    return search(config, unet_of(folder), card, vram, limits, vae=vae_of(folder), rules=rules)


def refusal(outcome: PlanResult, source: str) -> str:
    """One line on why no plan fits the memory of `source`, and what would fit."""
    enough = f'; train.vram = "{size_text(outcome.enough)}" would do' if outcome.enough else ""
    usable = max(0, outcome.usable) / GIB
    return (
        f"no plan fits {source}, {outcome.vram / GIB:.2f} GiB ({usable:.2f} without the CUDA "
        f"context and workspaces): {outcome.advice}{enough}"
    )


def card_of(device: torch.device) -> Card:
    """This machine's GPU with measured rates, or with assumed ones if measuring fails; `source` says which.

    The assumed rates of an unknown GPU are those of the slowest card with as much memory.
    """
    name, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    total, capability = properties.total_memory, 10 * properties.major + properties.minor
    kernels = backend(device).name == "triton"
    try:
        return Card(name, total / GIB, capability, rates_of(device), kernels)
    except Exception as error:  # a run does not depend on measured rates
        why = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        card = find_card(name if "GB" in name else f"{name} {total / GIB:.0f}GB")
    except UserError:
        card = card_with(total)
    rates = card.rates._replace(source=f"{card.rates.source}: not measured ({why})")
    return card._replace(capability=capability, rates=rates, kernels=kernels)
