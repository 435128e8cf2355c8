"""Linear layers that train and are multiplied in fp8: `speed.fp8`.

Only layers of the transformer blocks, which have nearly all of a UNet's linear arithmetic. The others
(embeddings, `proj_in`, `proj_out`) cost little, and all of the UNet's data passes through them.

torchao's `Float8Linear` is not used. As a module of its own it would take the projections out of the
operators that `patch_unet` fuses, which would save the normed tensors again, and its amax, scale and cast are
passes of their own unless torch.compile fuses them. See kernels/mapo_kernels/fp8.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mapo_kernels import fp8_linear
from mapo_kernels.fp8 import MULTIPLE


class Fp8Linear(nn.Linear):
    """A linear layer, (…, C) → (…, N); an `nn.Linear` becomes one in place and keeps its Parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """The product in the input's dtype, or autocast's."""
        return fp8_linear(input, self.weight, self.bias)


def fits_fp8(name: str, weight: Tensor) -> bool:
    """Whether a linear layer of this name and weight (N, C) can be multiplied in fp8."""
    return ".transformer_blocks." in name and not any(size % MULTIPLE for size in weight.shape)


def use_fp8(unet: Any) -> None:
    """Let the linear layers of a UNet's transformer blocks multiply in fp8; before `patch_unet`."""
    for name, layer in unet.named_modules():
        if type(layer) is nn.Linear and fits_fp8(name, layer.weight):
            layer.__class__ = Fp8Linear
