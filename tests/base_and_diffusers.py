"""Runs in an environment that holds the base install and diffusers only: `make test-base`."""

import importlib.util

import torch
from diffusers import UNet2DConditionModel

import mapo_fast

BEYOND = (
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "pydantic",
    "typer",
    "rich",
    "psutil",
    "pyarrow",
)
for name in BEYOND:
    assert importlib.util.find_spec(name) is None, (
        f"{name} is installed: this is more than base and diffusers"
    )

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    cross_attention_dim=24,
).double()
latents, prompts = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 7, 24).double()


def predict() -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction and the gradient that reaches the first convolution."""
    predicted = unet(latents, 5, encoder_hidden_states=prompts).sample
    return predicted.detach(), torch.autograd.grad(predicted.square().mean(), unet.conv_in.weight)[0]


plain = predict()
classes = {type(module) for module in unet.modules()}
mapo_fast.patch_unet(unet)
assert {type(module) for module in unet.modules()} != classes, "patch_unet has changed nothing"
for fused, reference in zip(predict(), plain, strict=True):
    torch.testing.assert_close(fused, reference, rtol=1e-10, atol=1e-12)
mapo_fast.unpatch_unet(unet)
assert {type(module) for module in unet.modules()} == classes
print(f"base install and diffusers: patch_unet runs from {mapo_fast.__file__}")
