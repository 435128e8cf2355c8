"""UNet weights that live in host memory and visit the device unit by unit.

A unit is a module that runs once in a forward pass: a ResNet block, a transformer block, a projection, a
resampler. Units are numbered in the order in which they run. The streamed weights of each lie one after the
other in a host buffer of its own. The device has two slots:

    slot 0   even units      slot 1   odd units

A unit's parameters are views of its slot, for ever: `p.data` never changes, only what the slot holds does.
So everything that refers to a weight (tensors saved for backward, gradient hooks, the optimizer's tables,
CUDA graphs) stays right, as long as the slot holds the unit again by the time the weight is read.

Two triggers see to that (`ensure`): the module's forward, also when checkpointing repeats it, and the arrival
of the gradient of its output, which precedes every backward operation inside it. Each then prefetches the
unit that is next in the direction of travel into the other slot, whose owner is done: units do not overlap in
forward, and autograd runs operations in exactly the reverse order. While one unit computes, the next is on
its way. At both turning points, loss and optimizer step, the two units that come next are there already.

With a LoRA the frozen parameters are streamed. In full fine-tuning all parameters are; the code that updates
a unit's weights then calls `updated`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mapo_fast.engine.transfers import Ticket, Transfers
from mapo_fast.models.sdxl import execution_order

STREAMED_BYTES = 1 << 20
"""Units with less than this to stream stay on the device."""
_ALIGNMENT = 256
"""Alignment in bytes: that of separate weights in torch's allocator."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One module's streamed weights."""

    name: str
    """The module's name in the UNet."""
    index: int
    parameters: tuple[nn.Parameter, ...]
    nbytes: int
    host: Tensor
    """(nbytes,) uint8: the parameters as they lie in the slot."""


class _Slot:
    """Device memory that the units of one parity share."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.owner: Unit | None = None
        self.ticket = Ticket()
        """The newest copy into it or out of it."""


class WeightStreaming:
    """Moves a UNet's large weights to host memory and streams them.

    The UNet comes on the CPU and leaves on the device. Its streamed weights go to the host buffers unit by
    unit, so one unit at most is in host memory twice; the rest is moved to the device. Adapters and fused
    operators must be in place before; afterwards nothing may cast the UNet or move it.

    Args:
        unet: diffusers `UNet2DConditionModel`, changed in place.
        transfers: copies for the training device.
    """

    def __init__(self, unet: Any, transfers: Transfers) -> None:
        self.unet = unet
        self.transfers = transfers
        frozen = [p for p in unet.parameters() if not p.requires_grad]
        streamed = {id(p) for p in frozen or unet.parameters()}
        modules, layouts = [], []
        for name, module in execution_order(unet):
            layout, nbytes = _layout([p for p in module.parameters() if id(p) in streamed])
            if nbytes >= STREAMED_BYTES and module is not unet.conv_in:  # its weight names the UNet's device
                modules.append((name, module))
                layouts.append((layout, nbytes))
        self._slots = [
            _Slot(max((nbytes for _, nbytes in layouts[parity::2]), default=0), transfers.device)
            for parity in (0, 1)
        ]
        self.units: list[Unit] = []
        self._unit_of: dict[int, Unit] = {}
        self._host_of: dict[int, Tensor] = {}
        for index, ((name, module), (layout, nbytes)) in enumerate(zip(modules, layouts, strict=True)):
            unit = Unit(
                name, index, tuple(p for p, _ in layout), nbytes, transfers.empty_host((nbytes,), torch.uint8)
            )
            for parameter, offset in layout:
                host = _view(unit.host, offset, parameter)
                host.copy_(parameter.detach())
                parameter.data = _view(self._slots[index % 2].memory, offset, parameter)
                self._host_of[id(parameter)], self._unit_of[id(parameter)] = host, unit
            self.units.append(unit)
            self._watch(module, unit)
        self._at = 0
        self._direction = 1
        for tensor in itertools.chain(unet.parameters(), unet.buffers()):  # not `.to`: it swaps fake tensors
            tensor.data = tensor.data.to(transfers.device)

    def unit_of(self, parameter: Tensor) -> Unit | None:
        """The unit that streams a parameter; None if it stays on the device."""
        return self._unit_of.get(id(parameter))

    def ensure(self, unit: Unit) -> None:
        """Make the unit's weights available in its slot, until the next unit but one needs the slot."""
        self._fetch(unit)
        self.transfers.wait(self._slots[unit.index % 2].ticket)
        if unit.index != self._at:
            self._direction = 1 if unit.index > self._at else -1
        if unit.index in (0, len(self.units) - 1):  # where travel turns round
            self._direction = 1 if unit.index == 0 else -1
        self._at = unit.index
        following = unit.index + self._direction
        if 0 <= following < len(self.units):
            self._fetch(self.units[following])

    def updated(self, unit: Unit) -> None:
        """Take a unit's new weights from its slot back to host memory; call it right after their update.

        Raises:
            RuntimeError: the slot holds another unit, so other weights were updated.
        """
        slot = self._slots[unit.index % 2]
        if slot.owner is not unit:
            held = slot.owner.name if slot.owner is not None else "nothing"
            raise RuntimeError(f"the weights of {unit.name} were updated while its slot held {held}")
        slot.ticket = self.transfers.store(unit.host, slot.memory[: unit.nbytes])

    def state_dict(self) -> dict[str, Tensor]:
        """The UNet's state dict, with streamed tensors in host memory. The host waits for copies under way.

        To load weights, copy them into these tensors and call `reload`.
        """
        self.transfers.synchronize()
        tensors = self.unet.state_dict(keep_vars=True)
        return {name: self._host_of.get(id(t), t).detach() for name, t in tensors.items()}

    def reload(self) -> None:
        """Discard the slots' contents, because host memory has been written to."""
        for slot in self._slots:
            slot.owner = None

    def _fetch(self, unit: Unit) -> None:
        slot = self._slots[unit.index % 2]
        if slot.owner is not unit:
            slot.ticket = self.transfers.fetch(slot.memory[: unit.nbytes], unit.host)
            slot.owner = unit

    def _watch(self, module: nn.Module, unit: Unit) -> None:
        def before_forward(module: nn.Module, args: Any) -> None:
            self.ensure(unit)

        def before_backward(gradient: Tensor) -> None:
            self.ensure(unit)

        def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(before_backward)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)


def _layout(parameters: Sequence[nn.Parameter]) -> tuple[list[tuple[nn.Parameter, int]], int]:
    """Where parameters lie in one buffer: each with its offset in bytes; and the buffer's size.

    Rows of one matrix (`join_weights`) stay adjacent.
    """
    places = []
    end, before = 0, None
    for parameter in parameters:
        if before is None or not _adjacent(before, parameter):
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append((parameter, end))
        end, before = end + parameter.nbytes, parameter
    return places, -(-end // _ALIGNMENT) * _ALIGNMENT


def _adjacent(first: Tensor, second: Tensor) -> bool:
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.dtype == second.dtype
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """The bytes from `offset` on as a tensor with the type, shape and strides of another, dense one."""
    flat = memory[offset : offset + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
