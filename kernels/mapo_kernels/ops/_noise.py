"""Standard-normal noise as a pure function of a sample's key and an element's index, in Triton and in torch.

Element i of a sample, counted in logical (C, H, W) order whatever the memory layout, is word i mod 4 of
Philox counter i // 4 under the sample's 64-bit key. Box–Muller makes two normals of two words:

    r = √(−2·log u), u = (word + ½)/2³²        (r·cos θ, r·sin θ), θ = 2π·word'/2³²  (+ a fixed offset)

All four words are used and no element is computed twice. The smallest u is 2⁻³³, so |ε| ≤ 6.8. The angle is
reduced exactly, in integers, and sine and cosine are polynomials on [−π/4, π/4]: a library's sine carries a
slow path for huge arguments into the kernel, and its last bits differ between CPU and GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mapo_kernels._philox import philox_torch
from mapo_kernels._triton import jit, tl

TensorOrPair = Tensor | tuple[Tensor, Tensor]
"""(2B, …), the B chosen samples first, or a (chosen, rejected) tuple of (B, …)."""


class NoiseTarget(NamedTuple):
    """A target for `paired_loss` that is made again from the noise's keys instead of being stored and read.

    The denoiser saw x_t = α·x₀ + σ·ε from `paired_noise` with the same keys.
    """

    keys: Tensor
    """(B,) int64, one `noise_key` per pair."""
    kind: str = "epsilon"
    """`"epsilon"`: ε; `"v"`: α·ε − σ·x₀; `"flow"`: ε − x₀."""
    latents: TensorOrPair | None = None
    """The clean latents x₀ in the prediction's shape, for `"v"` and `"flow"`; unused by `"epsilon"`."""
    alphas: Tensor | None = None
    """(B,) α of each pair, for `"v"`; unused by the others."""
    sigmas: Tensor | None = None
    """(B,) σ of each pair, for `"v"`; unused by the others."""


@jit
def _circle(word):  # type: ignore[no-untyped-def]
    """Return cosine and sine of the angle that a uint32 stands for."""
    angle = ((word & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-09  # 2π/2³²
    q = angle * angle
    s = angle + angle * q * ((-1.9515295891e-4 * q + 8.3321608736e-3) * q - 1.6666654611e-1)
    c = 1.0 - 0.5 * q + q * q * ((2.443315711809948e-5 * q - 1.388731625493765e-3) * q + 4.166664568298827e-2)
    quarter = (word & 0x40000000) != 0
    sign = tl.where((word & 0x80000000) != 0, -1.0, 1.0)
    return sign * tl.where(quarter, -s, c), sign * tl.where(quarter, c, s)


@jit
def _radius(word):  # type: ignore[no-untyped-def]
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2⁻³², 2⁻³³
    return tl.sqrt(-2.0 * tl.log(u))


@jit
def normals(key, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements first … first + BLOCK of the sample with this key, fp32; `first` is a multiple of 4."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    low = counter.to(tl.uint32)
    high = (counter.to(tl.int64) >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, 0, 0)
    x_a, y_a = _circle(b)
    x_c, y_c = _circle(d)
    r_a = _radius(a)
    r_c = _radius(c)
    return tl.join(tl.join(r_a * x_a, r_c * x_c), tl.join(r_a * y_a, r_c * y_c)).reshape(BLOCK)


@jit
def noise_target(noise, latent, alpha, sigma, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a denoiser should predict that sees alpha·latent + sigma·noise."""
    if KIND == "v":
        target = alpha * noise - sigma * latent
    else:
        tl.static_assert(KIND == "flow")
        target = noise - latent
    return target


# --- The same in torch ---


def _circle_torch(word: Tensor) -> tuple[Tensor, Tensor]:
    angle = ((word & 0x3FFFFFFF) - 0x20000000).float() * 1.4629180792671596e-09
    q = angle * angle
    s = angle + angle * q * ((-1.9515295891e-4 * q + 8.3321608736e-3) * q - 1.6666654611e-1)
    c = 1.0 - 0.5 * q + q * q * ((2.443315711809948e-5 * q - 1.388731625493765e-3) * q + 4.166664568298827e-2)
    quarter = (word & 0x40000000) != 0
    sign = torch.where((word & 0x80000000) != 0, -1.0, 1.0)
    return sign * torch.where(quarter, -s, c), sign * torch.where(quarter, c, s)


def _radius_torch(word: Tensor) -> Tensor:
    return torch.sqrt(-2.0 * torch.log(word.float() * 2.3283064365386963e-10 + 1.1641532182693481e-10))


def noise_target_torch(
    kind: str, noise: Tensor, latent: Tensor | None, alphas: Tensor | None, sigmas: Tensor | None
) -> Tensor:
    """The target of B samples, in the noise's dtype; `noise` and `latent` are (B, …), the scales (B,)."""
    if kind == "epsilon":
        return noise
    assert latent is not None
    if kind == "flow":
        return noise - latent.to(noise.dtype)
    assert alphas is not None
    assert sigmas is not None
    alpha, sigma = (s.to(noise.dtype).view(-1, *[1] * (noise.ndim - 1)) for s in (alphas, sigmas))
    return alpha * noise - sigma * latent.to(noise.dtype)


def normals_torch(keys: Tensor, sample: tuple[int, ...]) -> Tensor:  # (B,) int64 → (B, *sample) fp32
    """The noise of whole samples."""
    numel = torch.Size(sample).numel()
    counter = torch.arange(-(-numel // 4), device=keys.device)
    a, b, c, d = philox_torch(keys[:, None], counter & 0xFFFFFFFF, counter >> 32, 0, 0)
    (x_a, y_a), (x_c, y_c) = _circle_torch(b), _circle_torch(d)
    r_a, r_c = _radius_torch(a), _radius_torch(c)
    noise = torch.stack([r_a * x_a, r_a * y_a, r_c * x_c, r_c * y_c], dim=-1)
    return noise.view(len(keys), -1)[:, :numel].reshape(len(keys), *sample)
