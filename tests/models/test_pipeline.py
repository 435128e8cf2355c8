"""Incomplete or foreign pipeline folders are refused in one line that names the part."""

import errno
import inspect
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.configs import SCHEDULERS, ZERO_SNR_SCHEDULERS
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.util.errors import MachineError, UserError
from tests.tiny import POOLED_WIDTH, make_tiny_sdxl


@pytest.fixture
def model(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))


def refusal(call: Callable[[], Any]) -> str:
    """The one line that `call` ends with."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | changes), encoding="utf-8")


def edit_weights(model: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    (path,) = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


LOADERS: dict[str, tuple[Callable[[Pipeline], Any], str]] = {
    "text_encoder": (lambda f: f.load_text_encoder(1), "self_attn.q_proj"),
    "text_encoder_2": (lambda f: f.load_text_encoder(2, torch.float16), "text_projection"),
    "unet": (lambda f: f.load_unet(), "conv_in"),
    "vae": (lambda f: f.load_vae(torch.bfloat16), "encoder.conv_in"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_missing_weights(tiny_sdxl: Path, tmp_path: Path, part: str, variant: str | None) -> None:
    load, name = LOADERS[part]
    model = (
        Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
        if variant is None
        else make_tiny_sdxl(tmp_path / "model", variant=variant)
    )
    load(open_sdxl(model))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if name in key]:
            del tensors[key]

    path = edit_weights(model, part, drop)
    text = refusal(lambda: load(open_sdxl(model)))
    assert f"{path} lacks the tensor " in text
    assert name in text


@pytest.mark.parametrize("part", LOADERS)
def test_weights_of_another_shape(model: Path, part: str) -> None:
    load, name = LOADERS[part]

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if f"{name}.weight" in key)
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    path = edit_weights(model, part, widen)
    text = refusal(lambda: load(open_sdxl(model)))
    assert f"{path} has another shape of the tensor " in text
    assert name in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mid_block_type": None}, "has more than the model, the tensor mid_block."),
        ({"conv_in_kernel": 1}, "has another shape of the tensor conv_in.weight"),
    ],
)
def test_a_unet_config_that_is_not_its_weights_is_named_before_anything_is_loaded(
    model: Path, changes: dict[str, Any], problem: str
) -> None:
    edit(model / "unet" / "config.json", **changes)
    assert problem in refusal(lambda: open_sdxl(model))


def test_a_unet_without_all_its_weights_is_named_before_anything_is_loaded(model: Path) -> None:
    path = edit_weights(model, "unet", lambda tensors: tensors.pop("conv_in.bias"))  # type: ignore[arg-type,return-value]
    assert f"{path} lacks the tensor conv_in.bias" in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_weights_of_another_shape_are_named_before_anything_is_loaded(model: Path, part: str) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if f"{LOADERS[part][1]}.weight" in key)
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    path = edit_weights(model, part, widen)
    assert f"{path} has another shape of the tensor " in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("changes", [{"hidden_act": ""}, {"num_attention_heads": 7}])
def test_a_text_encoder_that_cannot_be_built_is_named_before_anything_is_loaded(
    model: Path, part: str, changes: dict[str, Any]
) -> None:
    edit(model / part / "config.json", **changes)
    assert f"cannot load {model / part}: " in refusal(lambda: open_sdxl(model, weights=False))


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_incomplete_tokenizer(model: Path, part: str, name: str) -> None:
    for file in (name, "tokenizer.json"):
        (model / part / file).unlink(missing_ok=True)
    assert refusal(lambda: open_sdxl(model)).endswith(f"{model / part / name} is missing")


def test_tokenizer_json_alone_is_enough(model: Path) -> None:
    expected = open_sdxl(model).load_tokenizer(2)
    expected.backend_tokenizer.save(str(model / "tokenizer_2" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer_2" / name).unlink()
    got = open_sdxl(model).load_tokenizer(2)
    assert got("a red thing").input_ids == expected("a red thing").input_ids


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_vocabulary(model: Path, content: str) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer" / "vocab.json").write_text(content)
    assert str(model / "tokenizer") in refusal(lambda: open_sdxl(model).load_tokenizer(1))


@pytest.mark.parametrize(
    "changes",
    [{"_class_name": "AutoencoderTiny"}, {"latent_channels": None}, {"block_out_channels": []}],
)
def test_foreign_vae_config(model: Path, changes: dict[str, Any]) -> None:
    edit(model / "vae" / "config.json", **changes)
    text = refusal(lambda: open_sdxl(model))
    assert str(model / "vae" / "config.json") in text
    assert next(iter(changes)) in text


def test_vae_of_another_number_of_channels(model: Path) -> None:
    edit(model / "vae" / "config.json", latent_channels=16)
    text = refusal(lambda: open_sdxl(model))
    assert "has 4 input channels" in text
    assert f"{model / 'vae'} have 16" in text


def test_another_kind_of_model_is_named(model: Path) -> None:
    edit(model / "unet" / "config.json", _class_name="SD3Transformer2DModel")
    text = refusal(lambda: open_sdxl(model))
    assert "_class_name = 'SD3Transformer2DModel', SDXL has 'UNet2DConditionModel'" in text


def test_inpainting_unet(model: Path) -> None:
    edit(model / "unet" / "config.json", in_channels=9)
    assert "is an inpainting UNet (9 input channels" in refusal(lambda: open_sdxl(model))


def test_another_vae_folder_is_blamed_by_its_own_setting(tiny_sdxl: Path, tmp_path: Path) -> None:
    missing = refusal(lambda: open_sdxl(tiny_sdxl, tmp_path / "nowhere"))
    assert missing.startswith(f"model.vae not found: {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    empty = refusal(lambda: open_sdxl(tiny_sdxl, tmp_path / "empty"))
    assert empty.startswith("model.vae cannot be used: ")
    assert str(tmp_path / "empty" / "config.json") in empty


@pytest.mark.parametrize("setting", ["model.path", "model.vae"])
def test_folder_without_permission(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    forbidden, is_dir = Path("/forbidden"), Path.is_dir

    def refusing(self: Path) -> bool:
        if self == forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refusing)
    paths = (forbidden,) if setting == "model.path" else (tiny_sdxl, forbidden)
    assert refusal(lambda: open_sdxl(*paths)) == f"{setting} = {forbidden} cannot be read: Permission denied"


def test_loading_is_silent_and_leaves_the_libraries_settings(
    tiny_sdxl: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    folder = open_sdxl(tiny_sdxl)
    folder.load_tokenizer(1)
    for load, _ in LOADERS.values():
        load(folder)
    assert "Loading" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity


# What the configs ask for and training does not give


SDXL_SCHEDULE: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "names"),
    [
        # Playground v2.5's
        (
            {
                "_class_name": "EDMDPMSolverMultistepScheduler",
                "prediction_type": "epsilon",
                "sigma_data": 0.5,
            },
            "_class_name = 'EDMDPMSolverMultistepScheduler'",
        ),
        ({**SDXL_SCHEDULE, "sigma_data": 0.5}, "sigma_data = 0.5"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
        ({**SDXL_SCHEDULE, "_class_name": "RePaintScheduler"}, "_class_name = 'RePaintScheduler'"),
        ({**SDXL_SCHEDULE, "_class_name": ["EulerDiscreteScheduler"]}, "_class_name = ['EulerDis"),
        ({k: v for k, v in SDXL_SCHEDULE.items() if k != "_class_name"}, "_class_name = None"),
        ({**SDXL_SCHEDULE, "use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ({**SDXL_SCHEDULE, "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({**SDXL_SCHEDULE, "prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"_class_name": "DDIMScheduler"}, "beta_schedule = None"),
        ({**SDXL_SCHEDULE, "beta_end": None}, "has no beta_end"),
        ({**SDXL_SCHEDULE, "beta_start": [0.1]}, "beta_start = [0.1]"),
        ({**SDXL_SCHEDULE, "beta_end": 1.5}, "beta_end = 1.5"),
        ({**SDXL_SCHEDULE, "num_train_timesteps": "1000"}, "num_train_timesteps = '1000'"),
        ({**SDXL_SCHEDULE, "num_train_timesteps": 10**4000}, "num_train_timesteps = 1000000"),
        ({**SDXL_SCHEDULE, "num_train_timesteps": 0}, "num_train_timesteps = 0"),
        ({**SDXL_SCHEDULE, "trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps = 1000"),
        ({**SDXL_SCHEDULE, "trained_betas": [0.1, "x"]}, "trained_betas = [0.1, 'x']"),
        ({**SDXL_SCHEDULE, "trained_betas": [0.0] + [0.01] * 999}, "timestep 0 has no noise"),
        ({**SDXL_SCHEDULE, "beta_start": 1e-12}, "timestep 0 has no noise"),
        ({**SDXL_SCHEDULE, "trained_betas": [0.01] * 999 + [1.0]}, "the last timestep is pure noise"),
        ({**SDXL_SCHEDULE, "num_train_timesteps": 100_000}, "the last timestep is pure noise"),
        (
            {
                **SDXL_SCHEDULE,
                "_class_name": "PNDMScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            "ignores zero terminal SNR",
        ),
    ],
)
def test_another_noise_schedule_is_named(model: Path, config: dict[str, Any], names: str) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    text = refusal(lambda: open_sdxl(model, weights=False))
    assert str(path) in text
    assert names in text
    assert len(text) < 600


def test_the_samplers_that_know_zero_terminal_snr_are_those_of_diffusers() -> None:
    import diffusers

    knowing = {
        name
        for name in SCHEDULERS
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name)).parameters
    }
    assert knowing == ZERO_SNR_SCHEDULERS


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # in diffusers' Euler schedulers
@pytest.mark.parametrize(
    "name", ["DDPM", "DDIM", "PNDM", "EulerAncestralDiscrete", "LCM", "DPMSolverMultistep"]
)
def test_samplers_of_the_discrete_schedule_are_taken(model: Path, name: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=500
    )
    scheduler.save_pretrained(model / "scheduler")
    betas = Diffusion(open_sdxl(model).scheduler_config).scheduler.betas
    torch.testing.assert_close(betas, scheduler.betas)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_another_scheduler_in_the_pipelines_index_is_named(model: Path, name: str) -> None:
    """diffusers samples by it, whatever class the scheduler's own config states."""
    edit(model / "model_index.json", scheduler=["diffusers", name])
    text = refusal(lambda: open_sdxl(model, weights=False))
    assert f"model_index.json (scheduler) has _class_name = '{name}'" in text


def test_a_prediction_type_that_train_states_counts(model: Path) -> None:
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "prediction_type = 'sample'" in refusal(lambda: open_sdxl(model))
    assert open_sdxl(model, None, {"prediction_type": "epsilon"}).scheduler_config["beta_end"] == 0.012


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"num_class_embeds": 4}, "num_class_embeds = 4"),
        ({"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim = 4096"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type = 'ip_image_proj'"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        ({"attention_type": "gated"}, "attention_type = 'gated'"),
        ({"dual_cross_attention": True}, "dual_cross_attention = True"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type = 'text_image'"),
        ({"out_channels": 8}, "has 8 output channels"),
        ({"in_channels": 8}, "has 8 input channels, twice"),
        ({"cross_attention_dim": POOLED_WIDTH}, "16 + 24 = 40; a refiner takes the second one's alone"),
        ({"cross_attention_dim": [40, 64]}, "cross_attention_dim = [40, 64]"),
        ({"cross_attention_dim": [40, 40, 40]}, "3 entries in cross_attention_dim for 2 down_block_types"),
        ({"projection_class_embeddings_input_dim": 64}, "5 × 8 + 24 is a refiner's"),
        ({"projection_class_embeddings_input_dim": None}, "projection_class_embeddings_input_dim = None"),
        ({"addition_time_embed_dim": "8"}, "addition_time_embed_dim = '8'"),
        ({"layers_per_block": [1, 1, 1]}, "3 entries in layers_per_block"),
        ({"layers_per_block": 10**6}, "layers_per_block = 1000000"),
        ({"block_out_channels": [16, -32]}, "block_out_channels = [16, -32]"),
        ({"block_out_channels": 16}, "block_out_channels = 16"),
        ({"in_channels": True}, "in_channels = True"),
        ({"attention_head_dim": {}}, "attention_head_dim = {}"),
        ({"down_block_types": ["DownBlock2D", "Other"]}, "Other does not exist"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"norm_num_groups": 5}, "must be divisible by num_groups (5)"),
    ],
)
def test_a_unet_that_training_cannot_feed_is_named(model: Path, changes: dict[str, Any], names: str) -> None:
    edit(model / "unet" / "config.json", **changes)
    text = refusal(lambda: open_sdxl(model, weights=False))
    assert str(model / "unet") in text or str(model) in text
    assert names in text


def test_the_refiners_pipeline_is_named(model: Path) -> None:
    edit(model / "model_index.json", requires_aesthetics_score=True)
    assert "this is the SDXL refiner" in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": [16]}, "hidden_size = [16]"),
        ({"max_position_embeddings": 64}, "max_position_embeddings = 64: prompts take 77"),
        ({"model_type": "chatglm"}, "model_type = 'chatglm'"),
        ({"projection_dim": -1}, "projection_dim = -1"),
    ],
)
def test_a_text_encoder_that_is_not_clip_is_named(model: Path, changes: dict[str, Any], names: str) -> None:
    path = model / "text_encoder_2" / "config.json"
    edit(path, **changes)
    assert f"{path} has {names}" in refusal(lambda: open_sdxl(model, weights=False))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"latents_mean": [0.0] * 4}, "one of latents_mean and latents_std"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 numbers in latents_mean"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]},
            "latents_std = [1.0, 1.0, 0.0, 1.0]",
        ),
        ({"scaling_factor": 0}, "scaling_factor = 0"),
        ({"scaling_factor": "0.13"}, "scaling_factor = '0.13'"),
        ({"in_channels": 1}, "in_channels = 1"),
        ({"shift_factor": 0.1}, "shift_factor = 0.1"),
        ({"down_block_types": ["Other"] * 3}, "Other does not exist"),
    ],
)
def test_a_vae_of_another_kind_is_named(model: Path, changes: dict[str, Any], names: str) -> None:
    edit(model / "vae" / "config.json", **changes)
    assert names in refusal(lambda: open_sdxl(model, weights=False))


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_a_special_token_is_named(model: Path, name: str, part: str) -> None:
    path = model / part / "tokenizer_config.json"
    edit(path, **{name: None})
    assert f"{path} has {name} = None" in refusal(lambda: open_sdxl(model))


def test_a_pad_token_that_the_vocabulary_has_not(model: Path) -> None:
    settings = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in config.items() if name != "pad_token"}))
    for name in ("special_tokens_map.json", "tokenizer.json"):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    folder = open_sdxl(model)
    tokenizer = folder.load_tokenizer(1)
    assert tokenizer.pad_token_id is not None, "CLIP's own is taken where none is stated"


def test_an_end_token_that_the_text_encoder_looks_for_in_vain(model: Path) -> None:
    edit(model / "text_encoder_2" / "config.json", eos_token_id=7)
    assert "eos_token_id = 7, its tokenizer" in refusal(lambda: open_sdxl(model).load_tokenizer(2))
    edit(model / "text_encoder_2" / "config.json", eos_token_id=2)  # as SDXL has it
    open_sdxl(model).load_tokenizer(2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bf16", "fp32", "non_ema", "fp16-fix", "ema.fp16"])
def test_any_variant_is_used_where_it_is_the_only_one(model: Path, variant: str) -> None:
    for part, (load, _) in LOADERS.items():
        (path,) = (model / part).glob("*.safetensors")
        path.rename(path.with_suffix(f".{variant}.safetensors"))
        load(open_sdxl(model))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "fp16-fix"])
def test_a_variant_in_several_files(model: Path, variant: str) -> None:
    unet = open_sdxl(model).load_unet()
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", variant=variant, max_shard_size="100KB")
    assert len({stored.file for stored in open_sdxl(model).parts["unet"].stored.values()}) > 1
    for saved, loaded in zip(unet.parameters(), open_sdxl(model).load_unet().parameters(), strict=True):
        assert torch.equal(saved, loaded)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_a_link_does_not_lead_to_are_named(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    path.unlink()
    path.symlink_to("../../blobs/0123")
    assert f"{path} is no regular file, or a link to nothing" in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize("which", [1, 2])
def test_a_text_encoder_with_more_layers_than_its_config_says(model: Path, which: Literal[1, 2]) -> None:
    edit(model / ("text_encoder" if which == 1 else "text_encoder_2") / "config.json", num_hidden_layers=1)
    text = refusal(lambda: open_sdxl(model).load_text_encoder(which))
    assert "has more than the model, the tensor" in text
    assert ".layers.1." in text


def test_which_of_several_variants_is_not_guessed(model: Path) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    shutil.copy(path, path.with_suffix(".ema.safetensors"))
    used = {stored.file for stored in open_sdxl(model).parts["unet"].stored.values()}
    assert used == {path}, "the plain one is used"
    path.rename(path.with_suffix(".non_ema.safetensors"))
    assert "several variants (ema, non_ema)" in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../b"}}]
)
def test_a_damaged_index_of_weights_is_named(model: Path, index: dict[str, Any]) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    path.unlink()
    index_path = path.with_name(f"{path.name}.index.json")
    index_path.write_text(json.dumps(index))
    assert str(index_path) in refusal(lambda: open_sdxl(model))


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error", "x")])
def test_a_machine_that_fails_is_not_blamed_on_the_model(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from diffusers import AutoencoderKL

    def failing(*args: Any, **options: Any) -> None:
        raise error

    folder = open_sdxl(tiny_sdxl)
    monkeypatch.setattr(AutoencoderKL, "from_config", failing)
    with pytest.raises(MachineError):
        folder.load_vae()


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**30, -(10**30), 10**4000, 1.5, 1e-300, math.nan, math.inf),
    *(
        "",
        "x",
        "\x1b[31m\n",
        [],
        {},
        [[]],
        [0],
        [1, 2],
        [1, [2]],
        {"a": 1},
        [None],
        ["DownBlock2D"],
        [4] * 20,
    ),
]


@pytest.mark.slow
def test_whatever_stands_in_a_config_is_taken_or_named_in_one_line(model: Path) -> None:
    draw = random.Random(0)
    paths = sorted(path for path in model.rglob("*.json") if "config" in path.name or "index" in path.name)
    whole = {path: path.read_text() for path in paths}
    refused = []
    for _ in range(150):
        path = draw.choice(paths)
        config = json.loads(whole[path])
        name, value = draw.choice(sorted(config)), draw.choice(VALUES)
        if isinstance(config[name], list) and config[name] and draw.random() < 0.5:
            config[name][draw.randrange(len(config[name]))] = value
        else:
            config[name] = value
        path.write_text(json.dumps(config))
        try:
            Diffusion(open_sdxl(model).scheduler_config)
        except UserError as error:
            refused.append(str(error))
        path.write_text(whole[path])
    assert 30 < len(refused) < 120
    for text in refused:
        assert str(model) in text or "zero terminal SNR" in text
        assert text.isprintable()
        assert len(text) < 600


@pytest.mark.parametrize(
    "damage",
    [
        (2**62).to_bytes(8, "little"),
        (10**9).to_bytes(8, "little"),
        b"\x02" + bytes(7) + b"[]",
        len(entry := b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}').to_bytes(8, "little")
        + entry,
        len(entry := b'{"a": {"data_offsets": [0, 99999999999]}}').to_bytes(8, "little") + entry,
        len(entry := b'{"a": 1}').to_bytes(8, "little") + entry,
        b"",
    ],
)
def test_a_damaged_weights_header_is_one_line(model: Path, damage: bytes) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    path.write_bytes(damage + bytes(100))
    assert f"{path} cannot be read as safetensors" in refusal(lambda: open_sdxl(model))
