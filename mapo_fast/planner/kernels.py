"""Compile a run's kernels, in threads, while its weights load.

Which kernels that are is asked of the run itself: a step of its own engine on memory that is never touched,
once for each kind of image shape, stopped where Triton would compile. A UNet with one transformer block
where the model has ten launches the same ones. Threads then fill Triton's cache on disk, where the first
launch finds them: most of the time is ptxas's, a process of its own.

Launches of other image shapes need no other kernels: sizes are arguments, and all that a shape decides is how
many of its positions a load may take at once (`UNIT` of the group norms), and whether the loss's programs
are a multiple of 16.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.models import sdxl
from mapo_fast.planner import store, trace
from mapo_fast.planner.recorder import Recorder
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_kernels import hardware

try:
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction
except Exception:  # see `mapo_kernels._triton`
    triton = None

Bucket = tuple[int, int]
"""(height, width) in pixels."""
MOST_THREADS = 8
PROGRAM = 1024
"""Elements of four latent channels that a program of the loss takes."""


class Kernel(NamedTuple):
    """One specialisation of one kernel."""

    function: Any
    signature: Any
    constants: Any
    attributes: Any
    options: Any

    def compile(self, target: Any) -> None:
        """Compile into Triton's cache; errors are ignored here and raised at the launch."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        with suppress(Exception):
            triton.compile(source, target=target, options=self.options.__dict__)


class _Absent:
    """Triton's driver as far as specialising a launch goes."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def kinds_of_shapes(buckets: Iterable[Bucket], levels: int) -> list[Bucket]:
    """One bucket for each way in which the sizes of a UNet's maps can be divided, largest first."""
    found: dict[tuple[int, ...], Bucket] = {}
    for height, width in sorted(buckets, key=lambda size: -size[0] * size[1]):
        steps = [sdxl.LATENT * 2**level for level in range(levels)]
        maps = [-(-height // step) * -(-width // step) for step in steps]
        loads = [math.gcd(positions, 8) for positions in maps]
        found.setdefault((*loads, -(-maps[0] * 4 // PROGRAM) % 16 == 0), (height, width))
    return list(found.values())


def kernels_of(
    config: Config, unet_config: dict[str, Any], buckets: Iterable[Bucket], target: Any, card: hardware.Card
) -> dict[Any, Kernel]:
    """The kernels that a run's steps launch, each once, under Triton's key.

    Args:
        config: as planned.
        unet_config: of a diffusers `UNet2DConditionModel`.
        buckets: image shapes.
        target: Triton's, of the card.
    """
    found: dict[Any, Kernel] = {}

    def found_one(function: Any, key: Any, signature: Any, device: int, constants: Any, options: Any,
                  attributes: Any, warmup: bool) -> None:  # fmt: skip
        known = (function.__module__, function.__name__, repr(key))
        found.setdefault(known, Kernel(function, signature, constants, attributes, options))

    config, unet_config = _smaller(config, unet_config)
    precision = trace.traced_precision(config)
    unets = [
        trace.untouched_unet(unet_config, precision.base) for _ in range(1 + (config.reference == "copy"))
    ]
    driver = triton.runtime.driver
    with (
        mock.patch.object(JITFunction, "_do_compile", found_one),
        mock.patch.object(driver, "_active", None),
        hardware.assume_card(card),
        Recorder([p for one in unets for p in one.parameters()]),
    ):
        driver.set_active(_Absent(target))
        parts = prepare_unet(unets[0], config, precision, trace.CPU)
        parts = with_start_model(parts, config, lambda: unets[1])
        engine = Engine(config, parts, build_loss(config.objective, 1000), precision, trace.CPU)
        for height, width in kinds_of_shapes(buckets, len(unet_config["block_out_channels"])):
            inputs = trace.pairs_of_zeros(config.train.pairs_per_batch, 8, unet_config)
            shape = (*inputs.noisy.shape[:2], height // sdxl.LATENT, width // sdxl.LATENT)
            inputs = inputs._replace(noisy=torch.zeros(shape), target=torch.zeros(shape))
            trace.take_step(engine, [inputs] * min(2, config.train.accumulation))
    return found


def _smaller(config: Config, unet_config: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Settings and a smaller UNet that launch the same kernels in less time."""
    changes = {f"offload.{what}": "gpu" for what in ("optimizer", "weights", "activations")}
    checkpointing = bool(config.train.gradient_checkpointing)  # blocks by name may not be there
    config = with_settings(config, trace.EAGER | changes | {"train.gradient_checkpointing": checkpointing})
    if "transformer_layers_per_block" in unet_config:
        unet_config = {**unet_config, "transformer_layers_per_block": 1}
        unet_config["reverse_transformer_layers_per_block"] = None
    return config, unet_config


@contextmanager
def compiling(
    config: Config, unet_config: dict[str, Any], buckets: Iterable[Bucket], device: torch.device
) -> Iterator[int]:
    """Compile a run's kernels in threads while the context is open; all are done at its end.

    Yields their number. Nothing is done where no kernel runs, or where they were compiled before.
    """
    if hardware.backend(device).name != "triton":
        yield 0
        return
    target, card = triton.runtime.driver.active.get_current_target(), hardware.card(device)
    done = _marker(config, unet_config, buckets, target)
    if done.exists():
        yield 0
        return
    kernels: Iterable[Kernel] = ()
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # a run does not depend on it
        kernels = kernels_of(config, unet_config, buckets, target, card).values()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(kernel.compile, target) for kernel in kernels]
        try:
            yield len(futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    with suppress(OSError):
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


def _marker(config: Config, unet_config: dict[str, Any], buckets: Iterable[Bucket], target: Any) -> Path:
    parts = [store.digest(config, unet_config, True), sorted(buckets), str(target), triton.__version__]
    return store.folder() / f"kernels-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"
