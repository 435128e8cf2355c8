"""A full fine-tune whose weights, gradients and optimizer states are split among processes: torch's FSDP2.

Each block gathers its weights before it runs, forward and backward, and its gradients are summed and split
after its backward, while the blocks around it compute. Parameters are DTensors, of which a process holds one
part and trains it as if it were all: the optimizer has no use for the rest. (torch's foreach and fused
functions take DTensors too, but look at every pair of a list's tensors first: minutes for SDXL's 1,680.)

Checkpoints and results hold whole tensors, so that a run goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mapo_fast.engine.layouts import checkpoint_blocks
from mapo_fast.engine.optim import GuardedOptimizer
from mapo_fast.engine.processes import Processes
from mapo_fast.util.tensorparts import split


def shard_unet(unet: Any, device: torch.device, processes: int) -> None:
    """Split a UNet on the CPU among the processes, block by block; it leaves on the device."""
    kind = type(unet)
    mesh = init_device_mesh(device.type, (processes,))
    for block in checkpoint_blocks(unet).values():
        fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)
    type(unet).__name__ = kind.__name__  # diffusers writes it into the result's config.json
    for module in unet.modules():
        if isinstance(module, FSDPModule):  # the loss has each process's share: add up, do not average
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


class ShardedOptimizer(GuardedOptimizer):
    """The optimizer of this process's part of each parameter; its `state` is of whole parameters.

    Args:
        build: makes the optimizer of a list of parameters; its entry must say `shard`.
        parameters: DTensors.
        max_grad_norm: largest norm of all parts together.
        processes: the run's processes.
    """

    def __init__(
        self,
        build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        parameters: Iterable[Any],
        *,
        max_grad_norm: float,
        processes: Processes,
    ) -> None:
        self.whole, self.processes = list(parameters), processes
        parts = [torch.nn.Parameter(p.detach().to_local()) for p in self.whole]  # in the same memory
        super().__init__(build(parts), parts, max_grad_norm=max_grad_norm, scaler=None)

    def step(self) -> Tensor:
        """Take the guarded step in all processes together; see `GuardedOptimizer.step`."""
        for parameter, part in zip(self.whole, self.parameters, strict=True):
            part.grad = parameter.grad.to_local() if parameter.grad is not None else None
            parameter.grad = None
        return super().step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of a checkpoint, with DTensors where the state is split."""
        tensors, state = super().state()
        state["optimizer"]["shapes"] = [list(p.shape) for p in self.whole]
        return {name: self._joined(name, tensor) for name, tensor in tensors.items()}, state

    def restore(self, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take over the state, in whole tensors, of any optimizer of this class for the same parameters."""
        description = dict(state["optimizer"])
        if description["shapes"] == [list(p.shape) for p in self.whole]:
            description["shapes"] = [list(p.shape) for p in self.parameters]
        super().restore(self._parts(tensors), {**state, "optimizer": description})

    def _norm(self) -> Tensor:
        return self.processes.sum_(super()._norm().square()).sqrt()

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        like = self.whole[int(name.partition(".")[0])]
        if tensor.dim() == 0:  # the step
            return tensor
        return DTensor.from_local(
            tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _parts(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            like = self.whole[int(name.partition(".")[0])]
            yield name, tensor if tensor.dim() == 0 else split(tensor, like).to_local()
