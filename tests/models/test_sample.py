"""Sampling: one seed one image whatever the batches, the same as plain diffusers, quiet."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sample import decode_latents, sample_latents
from mapo_fast.run.preview import Previews
from mapo_fast.util.errors import UserError
from tests.tiny import POOLED_WIDTH, TEXT_WIDTH, make_tiny_sdxl
from tests.training import make_config

SIZE = {"height": 32, "width": 48, "steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def folder(tiny_sdxl: Path) -> Pipeline:
    return open_sdxl(tiny_sdxl)


@pytest.fixture(scope="module")
def unet(folder: Pipeline) -> Any:
    return folder.load_unet()


def embeds(folder: Pipeline, count: int, seed: int = 0) -> Any:
    width = int(folder.config("unet")["cross_attention_dim"])
    generator = torch.Generator().manual_seed(seed)
    assert width == 2 * TEXT_WIDTH or width == TEXT_WIDTH + POOLED_WIDTH
    return SimpleNamespace(
        prompt_embeds=torch.randn(count, 77, width, generator=generator),
        pooled_embeds=torch.randn(count, POOLED_WIDTH, generator=generator),
    )


def sample(unet: Any, folder: Pipeline, rows: slice, batch_size: int, seeds: list[int]) -> Tensor:
    every = embeds(folder, 5)
    prompts = SimpleNamespace(
        prompt_embeds=every.prompt_embeds[rows], pooled_embeds=every.pooled_embeds[rows]
    )
    empty = embeds(folder, 1, seed=9)
    return sample_latents(unet, folder, prompts, empty, seeds=seeds, batch_size=batch_size, **SIZE)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_sample_depends_on_its_seed_and_prompt_alone(unet: Any, folder: Pipeline) -> None:
    seeds = [3, 1, 4, 1, 5]
    together = sample(unet, folder, slice(0, 5), 5, seeds)
    for batch_size in (1, 2):
        torch.testing.assert_close(sample(unet, folder, slice(0, 5), batch_size, seeds), together)
    alone = sample(unet, folder, slice(2, 3), 1, seeds[2:3])
    torch.testing.assert_close(alone, together[2:3])
    assert not torch.allclose(together[1], together[3], atol=1e-2)  # the same seed, another prompt
    torch.testing.assert_close(sample(unet, folder, slice(0, 5), 5, seeds), together, rtol=0, atol=0)


def test_the_seed_matters_and_global_randomness_does_not(unet: Any, folder: Pipeline) -> None:
    first = sample(unet, folder, slice(0, 1), 1, [0])
    torch.rand(7)
    torch.testing.assert_close(sample(unet, folder, slice(0, 1), 1, [0]), first, rtol=0, atol=0)
    assert not torch.allclose(sample(unet, folder, slice(0, 1), 1, [1]), first, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # in diffusers' Euler scheduler
@pytest.mark.parametrize(("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", True)])
def test_same_as_the_plain_diffusers_pipeline(tmp_path: Path, prediction: str, zero_snr: bool) -> None:
    from diffusers import StableDiffusionXLPipeline

    root = make_tiny_sdxl(tmp_path / "sdxl", prediction_type=prediction, zero_terminal_snr=zero_snr)
    folder = open_sdxl(root)
    pipeline = StableDiffusionXLPipeline.from_pretrained(root, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if zero_snr:
        config = dict(pipeline.scheduler.config, timestep_spacing="trailing")
        pipeline.scheduler = pipeline.scheduler.from_config(config)
    with torch.no_grad():
        hidden, empty_hidden, pooled, empty_pooled = pipeline.encode_prompt("a cat", negative_prompt="")
    prompts = SimpleNamespace(prompt_embeds=hidden, pooled_embeds=pooled)
    empty = SimpleNamespace(prompt_embeds=empty_hidden, pooled_embeds=empty_pooled)
    ours = sample_latents(pipeline.unet, folder, prompts, empty, seeds=[7], **SIZE)  # type: ignore[arg-type]
    theirs = pipeline(
        "a cat",
        negative_prompt="",
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs)
    assert ours.isfinite().all()

    image = decode_latents(pipeline.vae, ours, batch_size=1)[0]
    assert image.size == (48, 32)
    with torch.no_grad():
        decoded = pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded)[0]
    assert image.tobytes() == expected.tobytes()


def test_leaves_the_unet_as_it_was_and_prints_nothing(
    unet: Any, folder: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    unet.train()
    latents = sample(unet, folder, slice(0, 1), 1, [0])
    assert unet.training
    unet.eval()
    assert not latents.requires_grad
    assert capfd.readouterr() == ("", "")


def test_wrong_arguments_are_named(unet: Any, folder: Pipeline) -> None:
    with pytest.raises(ValueError, match="5 prompts need 5 seeds, got 2"):
        sample(unet, folder, slice(0, 5), 5, [0, 1])
    prompts = embeds(folder, 1)
    with pytest.raises(ValueError, match="multiples of 8"):
        sample_latents(unet, folder, prompts, prompts, seeds=[0], height=30, width=32)


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": 0},
        {"steps_offset": "x"},
        {"use_exponential_sigmas": "yes"},
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
        {"final_sigmas_type": True},
    ],
)
def test_a_scheduler_that_cannot_sample_is_named_before_the_first_step(
    tiny_sdxl: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    shutil.copytree(tiny_sdxl, tmp_path / "model")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    settings = {"prompts": ["red"], "every": 1}
    config = make_config(tmp_path / "model", tmp_path / "cache", tmp_path / "out", preview=settings)
    with pytest.raises(UserError, match="cannot be sampled by in 25 steps") as error:
        Previews(config, open_sdxl(config.model.path), torch.device("cpu"))
    assert str(path) in str(error.value)
