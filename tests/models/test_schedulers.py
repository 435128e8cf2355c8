"""Every sampler gives what diffusers' own SDXL pipeline gives for the same settings, from the text on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast.models.conditioning import conditionings
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sample import noise_seed, sample_latents
from mapo_fast.models.schedulers import SAMPLERS, Method, quiet_arrays, scheduler
from mapo_fast.util.errors import UserError
from tests.tiny import make_tiny_sdxl

PROMPT, SEED = "a red cat", 7
METHODS = [(name, "normal") for name in SAMPLERS]
METHODS += [(name, "karras") for name in ("euler", "dpmpp_2m", "dpmpp_2m_sde")]
OURS: dict[str, Any] = {"height": 32, "width": 48, "steps": 4, "guidance": 4.0, "rescale": 0.3}


@quiet_arrays()  # ours keeps its own warnings quiet
def theirs(root: Path, sampler: str, schedule: str, negative: str | None, **changes: Any) -> torch.Tensor:
    """The latents of diffusers' pipeline, set up as its documentation says."""
    import diffusers

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
        "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
    }
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(root, local_files_only=True)
    kind, stated = kinds[sampler]
    stated = {**stated, **changes, **({"use_karras_sigmas": True} if schedule == "karras" else {})}
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **stated)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(  # type: ignore[no-any-return]
        PROMPT,
        negative_prompt=negative,
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_rescale=0.3,
        generator=torch.Generator().manual_seed(noise_seed(PROMPT, SEED)),
        output_type="latent",
    ).images


def ours(root: Path, method: Method, **settings: str) -> torch.Tensor:
    model = open_sdxl(root)
    (found,) = conditionings(model, [PROMPT], device="cpu", dtype=torch.float32, **settings)
    seeds = [noise_seed(PROMPT, SEED)]
    return sample_latents(model.load_unet(), model, *found, seeds=seeds, method=method, batch_size=1, **OURS)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "schedule"), METHODS)
def test_latents_are_those_of_diffusers(tiny_sdxl: Path, sampler: str, schedule: str) -> None:
    expected = theirs(tiny_sdxl, sampler, schedule, None)  # no negative prompt: zeros, by the model's index
    found = ours(tiny_sdxl, Method(sampler, schedule))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other = ours(tiny_sdxl, Method(sampler, schedule), unconditional="empty")
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "blue"])
def test_encoded_unconditional_prompts_are_those_of_diffusers(tiny_sdxl: Path, negative: str) -> None:
    expected = theirs(tiny_sdxl, "euler", "normal", negative)  # diffusers encodes a text that is given
    found = ours(tiny_sdxl, Method(schedule="normal"), negative=negative, unconditional="empty")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_prediction_with_zero_terminal_snr(tmp_path: Path, sampler: str) -> None:
    root = make_tiny_sdxl(tmp_path / "sdxl", prediction_type="v_prediction", zero_terminal_snr=True)
    expected = theirs(root, sampler, "normal", None, timestep_spacing="trailing")
    torch.testing.assert_close(ours(root, Method(sampler, "normal")), expected, rtol=1e-4, atol=1e-4)
    assert expected.isfinite().all()


def test_a_schedule_that_diffusers_lacks_is_refused(tiny_sdxl: Path) -> None:
    for sampler in ("euler_ancestral", "ddim"):
        with pytest.raises(UserError, match=f"{sampler} has no schedule karras.*take normal"):
            scheduler(open_sdxl(tiny_sdxl), 4, Method(sampler, "karras"))


def test_spacing_of_comfyui_starts_at_the_last_timestep(tiny_sdxl: Path) -> None:
    model = open_sdxl(tiny_sdxl)
    spaced = scheduler(model, 4, Method(schedule="normal", spacing="linspace"))
    assert spaced.timesteps.tolist() == [999, 666, 333, 0]
    assert scheduler(model, 4, Method(schedule="normal")).timesteps.tolist() == [751, 501, 251, 1]


def test_noise_is_a_function_of_seed_and_prompt() -> None:
    assert noise_seed("a red cat", 7) == 6_114_503_845_721_338_072
    found = {noise_seed(prompt, seed) for prompt in ("a", "b", "1\na") for seed in (0, 1, -1)}
    assert len(found) == 9
    assert all(0 <= seed < 2**63 for seed in found)
