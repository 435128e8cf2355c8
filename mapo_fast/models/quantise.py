"""A frozen UNet in fewer bits: linear layers in nf4, int8 or fp8, convolutions in grouped int8.

| layer       | base   | stored                                                    | bits per weight |
|-------------|--------|-----------------------------------------------------------|-----------------|
| linear      | `nf4`  | blocks of 64, their maxima in 8 bits again (QLoRA)        | 4.13            |
| linear      | `int8` | int8, one maximum per row (LLM.int8)                      | 8.0             |
| linear      | `fp8`  | e4m3, one power of two per row; products in fp8           | 8.0             |
| in `INT8`   | all    | as `int8`                                                 | 8.0             |
| convolution | all    | int8, one maximum per output and group of input channels  | 8.4             |

A group is the smallest number of input channels that divides all and has at least 64 weights: 8 channels of a
3 × 3 kernel. Its error is a fraction of a per-output scale's, and 0.01 % from the best tried,
whose blocks do not follow channels (bench/results/quantised_base.jsonl).

In nf4 and int8 only weights are quantised. A layer makes its weight dense inside the operator, in forward and
again in backward, so neither dense weights nor inputs are saved; the fused operators of `patch_unet` take the
codes as they are. bitsandbytes makes nf4 and int8, but its layers are not used: Linear8bitLt quantises
activations too, Linear4bit repacks itself for inference on some CPUs, and neither can be traced on fake
tensors. Here codes are a Parameter and scales are buffers, which move, load and copy like those of any layer.

fp8 is there for its products, in which activations and gradients are fp8 too (kernels/mapo_kernels/fp8.py).
It saves no more memory than int8 and is less exact. So only layers of transformer blocks, which have most of
the arithmetic, are kept in fp8, and a GPU that cannot multiply fp8 is rejected (`prepare_unet`). The CPU
computes the same in the dtype of training.

Left dense: `conv_in` and `conv_out`, everything with fewer than 4,096 weights, norms and biases. `INT8` are
layers that everything passes through: in nf4 they cause half of the tiny SDXL's squared error, in int8 they
add 1 % to the full SDXL's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mapo_fast.models.fp8 import fits_fp8
from mapo_fast.util.errors import UserError
from mapo_kernels import FrozenWeight, frozen_conv2d, frozen_linear
from mapo_kernels.fp8 import to_fp8

__all__ = ["Quantised", "QuantisedConv2d", "QuantisedLinear", "quantise_base"]

SMALLEST = 4096
"""Weights below which a layer stays dense."""
DENSE = ("conv_in", "conv_out")
"""Layers that stay dense: 23,000 of SDXL's weights, through which everything passes."""
INT8 = ("linear_1", "linear_2", "proj_in", "proj_out")
"""Last names of linear layers that are never below 8 bits: the embeddings of time and size, and the first and
last layer of every transformer."""
GROUP = 64
"""Least weights that share a scale in a convolution."""
NF4_BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes' own defaults."""

Base = Literal["int8", "nf4", "fp8"]


class Quantised(NamedTuple):
    """One quantised layer."""

    name: str
    kind: str
    """`int8`, `nf4` or `fp8` of a linear layer, `int8 conv` of a convolution."""
    dense_bytes: int
    """The layer's dense weight."""
    stored_bytes: int
    """Codes and scales."""


class _Quantised(nn.Module):
    """A layer whose Parameter `weight` holds codes, with their scales as buffers; see `frozen_weight`."""

    weight: Tensor
    format: str
    _scales: tuple[str, ...]

    def store(self, frozen: FrozenWeight) -> None:
        """Replace the dense weight."""
        codes, *scales = frozen.tensors
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.format = frozen.format
        self._scales = ("absmax", "nested_absmax", "nested_code", "nested_offset")[: len(scales)]
        for name, scale in zip(self._scales, scales, strict=True):
            self.register_buffer(name, scale)

    @property
    def frozen_weight(self) -> FrozenWeight:
        """The quantised weight for the operators of `mapo_kernels`."""
        return FrozenWeight((self.weight, *(getattr(self, name) for name in self._scales)), self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the scales, never cast them."""
        exact = {name: getattr(self, name) for name in self._scales}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in exact.items():
            moved = getattr(self, name)
            if moved.dtype != scale.dtype:
                setattr(self, name, scale.to(moved.device))
        return self


class QuantisedLinear(_Quantised, nn.Linear):
    """A frozen linear layer, (…, C) → (…, N); an `nn.Linear` becomes one in place."""

    def forward(self, input: Tensor) -> Tensor:
        """In the input's dtype, or autocast's."""
        return frozen_linear(input, self.frozen_weight, self.bias)


class QuantisedConv2d(_Quantised, nn.Conv2d):
    """A frozen convolution, (N, C, H, W) → (N, O, H', W'); an `nn.Conv2d` becomes one in place.

    `weight` keeps its shape.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain layer: peft makes LoRA factors by the type of the layer they are added to."""
        return nn.Conv2d(*args, **kwargs) if args else super().__new__(cls)

    def forward(self, input: Tensor) -> Tensor:
        """In the input's dtype, or autocast's."""
        padding: Any = self.padding
        return frozen_conv2d(
            input,
            self.frozen_weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
        )


def quantise_base(unet: Any, base: Base, device: torch.device) -> list[Quantised]:
    """Quantise the UNet's large layers in place and move all of it to the device.

    Works layer by layer: the device holds at most one dense weight besides the quantised ones, and each dense
    weight is freed on the CPU. Add adapters afterwards.

    Args:
        unet: diffusers `UNet2DConditionModel`, dense, changed in place. On meta or fake tensors only sizes
            are made; such a UNet stays where it is.
        base: how linear layers are stored.
        device: where to, and where to quantise.

    Returns:
        The quantised layers in the UNet's order.

    Raises:
        UserError: bitsandbytes cannot be imported.
    """
    done = []
    traced = False
    for name, layer in unet.named_modules():
        if name in DENSE or not _large(layer):
            continue
        weight = layer.weight.detach()
        dense_bytes = weight.nbytes
        traced = weight.is_meta or isinstance(weight, FakeTensor)
        if not traced:
            weight = weight.to(device)
        if isinstance(layer, nn.Conv2d):
            kind, frozen = "int8 conv", _grouped_int8(weight)
            layer.__class__ = QuantisedConv2d
        else:
            kind = _kind(name, weight, base)
            frozen = (_sizes if traced else _quantise)(weight, kind)
            layer.__class__ = QuantisedLinear
        layer.store(frozen)
        done.append(Quantised(name, kind, dense_bytes, sum(t.nbytes for t in frozen.tensors)))
    if not traced:
        unet.to(device)
    return done


def _large(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and layer.weight.numel() >= SMALLEST
    return type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST


def _kind(name: str, weight: Tensor, base: Base) -> str:
    """Storage format of a linear layer."""
    low = name.rpartition(".")[2] not in INT8 and (base != "fp8" or fits_fp8(name, weight))
    return base if low else "int8"


def _quantise(weight: Tensor, kind: str) -> FrozenWeight:  # (N, C)
    if kind == "fp8":
        return FrozenWeight(to_fp8(weight), _format(kind, weight))
    try:
        from bitsandbytes import functional
    except Exception as error:  # of many kinds: not there, or its library does not load
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            "adapter.base = 'int8', 'nf4' and 'fp8' need bitsandbytes, which cannot be imported "
            f"({first}): install it, or use adapter.base = 'dense'"
        ) from None
    if kind == "int8":
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return FrozenWeight((codes, absmax), _format(kind, weight))
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    inner = state.state2
    return FrozenWeight((packed, state.absmax, inner.absmax, inner.code, state.offset), _format(kind, weight))


def _grouped_int8(weight: Tensor) -> FrozenWeight:  # (O, C, kh, kw)
    channels, window = weight.shape[1], weight[0, 0].numel()
    group = next(
        g for g in range(1, channels + 1) if channels % g == 0 and (g * window >= GROUP or g == channels)
    )
    grouped = torch.unflatten(weight.float(), 1, (-1, group))  # (O, G, group, kh, kw)
    absmax = grouped.abs().amax((2, 3, 4))  # (O, G)
    steps = 127 / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (grouped * steps[:, :, None, None, None]).round_().to(torch.int8).flatten(1, 2)
    return FrozenWeight((codes, absmax), _format("int8", weight.flatten(1)))


def _sizes(weight: Tensor, kind: str) -> FrozenWeight:
    """Uninitialised tensors of the shapes that `_quantise` would make of a meta or fake (N, C) weight."""

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return weight.new_empty(shape, dtype=dtype)

    rows = weight.shape[0]
    if kind in ("int8", "fp8"):
        tensors: tuple[Tensor, ...] = (
            new(*weight.shape, dtype=torch.int8 if kind == "int8" else torch.uint8),
            new(rows, dtype=torch.float32),
        )
    else:
        blocks = -(-weight.numel() // NF4_BLOCK)
        tensors = (
            new(-(-weight.numel() // 2), 1, dtype=torch.uint8),
            new(blocks, dtype=torch.uint8),
            new(-(-blocks // NESTED_BLOCK), dtype=torch.float32),
            new(256, dtype=torch.float32),
            new(dtype=torch.float32),
        )
    return FrozenWeight(tensors, _format(kind, weight))


def _format(kind: str, weight: Tensor) -> str:
    rows, columns = weight.shape
    if kind in ("int8", "fp8"):
        return f"{kind} {rows} {columns}"
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"nf4 {rows} {columns} {dtype} {NF4_BLOCK} {NESTED_BLOCK}"
