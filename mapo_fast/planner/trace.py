"""A training step of the real engine on memory that is never touched: what it allocates, computes, moves.

`record_step` builds the UNet of a config from its `config.json` alone, makes it ready by the trainer's own
`prepare_unet`, and lets the trainer's own `Engine` take a step. The result is the step in steady state: what
is alive at its end (optimizer states, buffers made when first needed) counts from its beginning.

Besides live bytes by category, a trace has marks where checkpointable blocks begin in forward and end in
backward; the pieces between them are what `windows.py` composes other plans from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.layouts import checkpoint_blocks
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import Precision, choose_precision
from mapo_fast.engine.step import PairInputs
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.engine.transfers import Ticket, Transfers
from mapo_fast.models import sdxl
from mapo_fast.models.text import chunk_count
from mapo_fast.planner.costs import FETCH, STORE, WAIT, Cost
from mapo_fast.planner.recorder import Recorder, card_path
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_kernels.hardware import Card

CPU = torch.device("cpu")
EAGER = {"train.attention": "sdpa", "speed.compile": False, "speed.cuda_graph": False}
"""Settings under which a recorder sees all operations. A compiled block saves what it saves eagerly, or less
where its partitioner finds less to do. What CUDA graphs keep reserved is added afterwards (`family.py`)."""
CARD = Card(89, 128)
"""The card that kernels are launched for. On other cards partial sums differ by a few hundred kB, so one
trace is used for all."""

CATEGORIES = ("parameters", "gradients", "states", "saved", "transient", "staging", "host")
"""`saved` lives from a forward pass into its backward; `staging` are buffers that streamed things visit;
`host` is what the engine keeps in pinned memory."""

ON_DEVICE = slice(0, 6)


class Mark(NamedTuple):
    """A border between two pieces of a step."""

    operation: int
    """Number of the operation after the mark."""
    name: str
    """`forward BLOCK`, where the block begins; `backward BLOCK`, where its backward ends; `accumulate`, where
    a micro-batch begins, and `finish` after the last; `loss` and `differentiated` around a backward pass."""


class Trace(NamedTuple):
    """A step of n operations."""

    kinds: np.ndarray  # (n,) uint8, of `costs`
    flops: np.ndarray  # (n,) fp64
    nbytes: np.ndarray  # (n,) fp64
    links: np.ndarray  # (n,) int64: the transfer that a transfer or a wait comes after, or -1
    live: np.ndarray  # (len(CATEGORIES), n) int64, bytes while an operation runs
    kept: np.ndarray  # (n,) int64, bytes of gradients if none were freed before the step's end
    marks: list[Mark]
    sizes: np.ndarray  # (m,) int64, bytes of each allocation on the device
    events: np.ndarray  # (e,) int64: n where allocation n is made, ~n where it is freed, in order
    slots: int
    """Bytes of the device buffers that streamed weights visit."""
    trainable: int
    """Trained numbers."""
    begins: list[int]
    """Start of each step in `events`; earlier events happen before training begins."""
    accumulation: int = 1
    """Micro-batches in a step; two of them are traced at most, between marks `accumulate`."""

    def row(self, category: str) -> np.ndarray:
        """Live bytes of one category, (n,)."""
        return np.asarray(self.live[CATEGORIES.index(category)])

    @property
    def device(self) -> np.ndarray:
        """Live bytes on the device, (n,)."""
        return np.asarray(self.live[ON_DEVICE].sum(0))

    @property
    def lasting(self) -> int:
        """Bytes on the device between steps."""
        return int(self.row("parameters").max() + self.row("states").max() + self.row("staging").min())

    @property
    def peak(self) -> int:
        """Most bytes on the device."""
        return int(self.device.max())

    @property
    def micro_batches(self) -> int:
        """Number of traced micro-batches."""
        return max(1, sum(mark.name == "accumulate" for mark in self.marks))

    @property
    def last_micro_batch(self) -> slice:
        """The operations of the last micro-batch that was traced."""
        borders = {mark.name: mark.operation for mark in self.marks}
        return slice(borders.get("accumulate", 0), borders.get("finish", len(self.kinds)))

    def with_one_more(self) -> Trace:
        """The operations of a step with one more micro-batch; memory is not extended."""
        again = self.last_micro_batch
        added = again.stop - again.start
        links = self.links.copy()
        links[again.stop :][links[again.stop :] >= again.start] += added
        repeated = self.links[again].copy()
        repeated[repeated >= again.start] += added

        def doubled(row: np.ndarray, middle: np.ndarray) -> np.ndarray:
            return np.concatenate([row[: again.stop], middle, row[again.stop :]])

        kinds, flops, nbytes = (doubled(row, row[again]) for row in (self.kinds, self.flops, self.nbytes))
        return self._replace(kinds=kinds, flops=flops, nbytes=nbytes, links=doubled(links, repeated))

    def at_peak(self) -> dict[str, int]:
        """Live bytes by category when most of the device is in use; and host memory at its own highest."""
        column = self.live[:, int(self.device.argmax())]
        found = dict(zip(CATEGORIES, column.tolist(), strict=True))
        return found | {"host": int(self.live[-1].max())}


def record_step(config: Config, unet_config: dict[str, Any], *, kernels: bool = True) -> Trace:
    """Trace one optimizer step of `config`, of square latents at the config's resolution.

    The traced step is the second one: tables and states exist, and states are fetched ahead in the order in
    which they will be asked for.

    Args:
        unet_config: of a diffusers `UNet2DConditionModel`.
        kernels: as on a card that our Triton kernels run on; else as in eager PyTorch.
    """
    precision = traced_precision(config)
    unets = [untouched_unet(unet_config, precision.base) for _ in range(1 + (config.reference == "copy"))]
    unet = unets[0]
    recorder = Recorder([p for one in unets for p in one.parameters()])
    with ExitStack() as stack:
        stack.enter_context(card_path(CARD if kernels else None, recorder))
        stack.enter_context(recorder)
        links = stack.enter_context(_transfers(recorder))
        plain = with_settings(config, EAGER)
        parts = prepare_unet(unet, plain, precision, CPU)
        parts = with_start_model(parts, plain, lambda: unets[1])
        if config.train.attention != "sdpa":
            for one in unets:
                _attend_apart(one)
        loss = build_loss(config.objective, 1000)
        trained = [p for p in unet.parameters() if p.requires_grad]

        def tag_gradients() -> None:
            for p in trained:
                p.register_post_accumulate_grad_hook(_tag_gradient(recorder))

        if config.train.fused_step:  # its hooks take gradients away; other hooks replace them by sums
            tag_gradients()
        engine = Engine(plain, parts, loss, precision, CPU)
        if not config.train.fused_step:
            tag_gradients()
        side, chunks = config.data.resolution // sdxl.LATENT, chunk_count(config.data.max_tokens)
        inputs = [
            pairs_of_zeros(config.train.pairs_per_batch, side, unet_config, chunks=chunks)
            for _ in range(_micro_batches(config))
        ]
        begins = [len(recorder.events)]
        take_step(engine, inputs)
        begins.append(len(recorder.events))
        recorder.restart()
        marks = stack.enter_context(_marks(recorder, unet))
        take_step(engine, inputs, lambda name: marks.append(Mark(len(recorder.operations), name)))
        _tag_persistent(recorder, engine)
        slots = {
            id(a): a.nbytes
            for one, weights in _unets(engine)
            for p in one.parameters()
            if weights is not None and weights.unit_of(p) is not None
            for a in [recorder.allocation(p)]
        }
    trace = _trace(recorder, marks, links, begins)
    trainable = sum(p.numel() for p in engine.parameters)
    return trace._replace(
        slots=sum(slots.values()), trainable=trainable, accumulation=config.train.accumulation
    )


def take_step(
    engine: Engine, inputs: list[PairInputs], mark: Callable[[str], None] = lambda name: None
) -> None:
    """A step of as many micro-batches as there are inputs; `mark` is told where each of its parts begins."""
    objective, pairs = engine.config.objective, engine.config.train.pairs_per_batch
    known = torch.zeros(2 * pairs) if engine.config.reference == "precomputed" else None
    labels = torch.zeros(pairs) if objective.known.labels == "required" else None
    if objective.known.samples == "single":
        labels = torch.zeros(2 * pairs, dtype=torch.bool)
    engine.start(1e-5)
    for batch in inputs:
        mark("accumulate")
        engine.accumulate(batch, 1 / len(inputs), reference_errors=known, labels=labels)
    mark("finish")
    engine.finish()
    mark("end")


def _unets(engine: Engine) -> list[tuple[Any, WeightStreaming | None]]:
    """The trained UNet and a frozen copy, each with what streams its weights."""
    found: list[tuple[Any, WeightStreaming | None]] = [(engine.unet, engine.parts.weights)]
    start = engine.parts.start
    if start is not None and start.unet is not engine.unet:
        found.append((start.unet, start.weights))
    return found


def _micro_batches(config: Config) -> int:
    """With accumulation, the second micro-batch is like all that follow: gradients are there already."""
    return min(2, config.train.accumulation)


def traced_precision(config: Config) -> Precision:
    """The precision of a config on its card, though the trace runs on the CPU."""
    if config.train.precision == "fp16":  # refused on the CPU, which computes nothing here
        return Precision(torch.float16, torch.float32, torch.float16, scaled=True)
    return choose_precision(config, CPU)


def untouched_unet(unet_config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A UNet of this config on memory that nobody has written to."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        for p in unet.parameters():
            p.data = p.data.to(dtype)
    return unet.to_empty(device=CPU).train()


class _Apart(AttnProcessor2_0):  # type: ignore[misc]
    """Any processor but diffusers' own is called by itself, with its projections after the norm."""


def _attend_apart(unet: Any) -> None:
    """A stand-in for xformers and flash-attn, which have no CPU code; they need as much memory as SDPA."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(_Apart())


def pairs_of_zeros(pairs: int, side: int, unet_config: dict[str, Any], *, chunks: int = 1) -> PairInputs:
    """Inputs of the right shapes, with prompts of so many chunks."""
    samples, channels = 2 * pairs, unet_config["in_channels"]
    return PairInputs(
        noisy=torch.zeros(samples, channels, side, side),
        timesteps=torch.zeros(samples, dtype=torch.int64),
        prompt_embeds=torch.zeros(samples, sdxl.CONTEXT * chunks, unet_config["cross_attention_dim"]),
        pooled_embeds=torch.zeros(samples, sdxl.pooled_width(unet_config)),
        time_ids=torch.zeros(samples, sdxl.TIME_IDS),
        target=torch.zeros(samples, channels, side, side),
    )


@contextmanager
def _transfers(recorder: Recorder) -> Iterator[dict[int, int]]:
    """Record copies between host and device; yields operation → the transfer it comes after.

    A ticket keeps its tensors until it is waited for, as on a GPU.
    """
    links: dict[int, int] = {}
    last: dict[int, int] = {}
    real_empty_host, real_wait = Transfers.empty_host, Transfers.wait

    def copied(kind: int, dst: Tensor, src: Tensor) -> Ticket:
        number = len(recorder.operations)
        memories = [recorder.allocation(x).number for x in (dst, src)]  # addresses are used again
        links[number] = max(last.get(memory, -1) for memory in memories)
        last.update(dict.fromkeys(memories, number))
        recorder.operations.append(Cost(kind, 0.0, float(dst.nbytes)))
        if kind == FETCH:
            recorder.allocation(dst).tag = "staging"
        ticket = Ticket(None, (dst, src))
        ticket.event = number  # type: ignore[assignment]
        return ticket

    def wait(transfers: Transfers, ticket: Ticket) -> None:
        if ticket.event is not None:
            links[len(recorder.operations)] = ticket.event  # type: ignore[assignment]
            recorder.operations.append(Cost(WAIT, 0.0, 0.0))
            ticket.event = None
        real_wait(transfers, ticket)

    def empty_host(transfers: Transfers, shape: Any, dtype: torch.dtype) -> Tensor:
        made = real_empty_host(transfers, shape, dtype)
        recorder.allocation(made).tag = "host"
        return made

    with (
        mock.patch.object(Transfers, "fetch", lambda _, dst, src: copied(FETCH, dst, src)),
        mock.patch.object(Transfers, "store", lambda _, dst, src: copied(STORE, dst, src)),
        mock.patch.object(Transfers, "wait", wait),
        mock.patch.object(Transfers, "empty_host", empty_host),
    ):
        yield links


@contextmanager
def _marks(recorder: Recorder, unet: Any) -> Iterator[list[Mark]]:
    """Note where blocks begin in forward and end in backward, and where backward passes begin."""
    marks: list[Mark] = []
    differentiating = False

    def mark(name: str) -> None:
        marks.append(Mark(len(recorder.operations), name))

    def watch(name: str) -> Any:
        def before(module: Any, args: Any) -> None:
            if differentiating:
                return  # checkpointing runs it again
            mark(f"forward {name}")
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: mark(f"backward {name}"))

        return before

    real_run = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal differentiating
        differentiating = True
        recorder.tag_saved()
        mark("loss")
        try:
            return real_run(*args, **kwargs)
        finally:
            differentiating = False
            mark("differentiated")

    handles = [
        block.register_forward_pre_hook(watch(name)) for name, block in checkpoint_blocks(unet).items()
    ]
    with mock.patch.object(torch.autograd, "_engine_run_backward", run_backward):
        yield marks
    for handle in handles:
        handle.remove()


def _tag_gradient(recorder: Recorder) -> Any:
    def tag(parameter: Tensor) -> None:
        if parameter.grad is not None:
            recorder.allocation(parameter.grad).tag = "gradients"

    return tag


def _tag_persistent(recorder: Recorder, engine: Engine) -> None:
    """Name what is still alive after the step, and let it live from the beginning."""
    for states in engine.optimizer.optimizer.state.values():
        for value in states.values():
            if isinstance(value, Tensor):
                recorder.name(value, "states")
    for unet, weights in _unets(engine):
        for p in [*unet.parameters(), *unet.buffers()]:
            streamed = weights is not None and weights.unit_of(p) is not None
            recorder.name(p, "staging" if streamed else "parameters")
    for allocation in recorder.allocations:
        if allocation.died is None:
            allocation.born = recorder.first
            allocation.tag = "staging" if allocation.tag in ("", "saved") else allocation.tag


def _events(recorder: Recorder, begins: list[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Sizes of the device's allocations, what happens to them in order, and where the steps begin in that.

    What is freed before the first step was on the host: weights are loaded there and go to the device once.
    """
    loaded = {~event for event in recorder.events[: begins[0]] if event < 0}
    numbers: dict[int, int] = {}
    events: list[int] = []
    starts: list[int] = []
    for i, event in enumerate(recorder.events):
        if i in begins:
            starts.append(len(events))
        number = event if event >= 0 else ~event
        if number in loaded or recorder.made[number].tag == "host":
            continue
        place = numbers.setdefault(number, len(numbers))
        events.append(place if event >= 0 else ~place)
    sizes = [recorder.made[number].nbytes for number in numbers]
    return np.array(sizes, dtype=np.int64), np.array(events, dtype=np.int64), starts


def _trace(recorder: Recorder, marks: list[Mark], links: dict[int, int], begins: list[int]) -> Trace:
    first = recorder.first
    n = len(recorder.operations) - first
    sizes, events, starts = _events(recorder, begins)
    changes = np.zeros((len(CATEGORIES), n + 1), dtype=np.int64)
    kept = np.zeros(n + 1, dtype=np.int64)
    for allocation in recorder.allocations:
        if allocation.tag == "gradients":
            kept[allocation.born - first] += allocation.nbytes
        row = CATEGORIES.index(allocation.tag or "transient")
        changes[row, allocation.born - first] += allocation.nbytes
        if allocation.died is not None:
            changes[row, allocation.died - first] -= allocation.nbytes
    kinds, flops, nbytes = zip(*recorder.operations[first:], strict=True)
    linked = np.full(n, -1, dtype=np.int64)
    for operation, after in links.items():
        if operation >= first:
            linked[operation - first] = max(after - first, -1)
    return Trace(
        np.array(kinds, dtype=np.uint8),
        np.array(flops),
        np.array(nbytes),
        linked,
        changes.cumsum(1)[:, :n],
        kept.cumsum()[:n],
        [Mark(operation - first, name) for operation, name in marks],
        sizes,
        events,
        slots=0,
        trainable=0,
        begins=starts,
    )
