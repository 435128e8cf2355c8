"""Keys of other trainers, wherever they stand: one line says what they are here."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.settings.foreign import FOREIGN, RATES, foreign
from mapo_fast.settings.load import load_config, parse_config
from mapo_fast.settings.presets import PRESETS, preset_table
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import TABLE
from mapo_fast.util.errors import UserError

MINIMAL = """
{top}
[model]
path = "base"
[data]
cache = "cache"
{data}
[train]
output = "run"
{train}
"""

LINES = {
    "learning_rate": f"did you mean optim.lr? {RATES}",
    "unet_lr": f"did you mean optim.lr? {RATES}",
    "text_encoder_lr": "only the UNet is trained: leave it out",
    "batch_size": "did you mean train.pairs_per_batch? It counts pairs: 1 pair is 2 images; for more of them "
    "in a step raise train.accumulation",
    "train_batch_size": "did you mean train.pairs_per_batch? It counts pairs: 1 pair is 2 images; for more "
    "of them in a step raise train.accumulation",
    "network_dim": "did you mean adapter.rank?",
    "rank": "did you mean adapter.rank?",
    "network_alpha": "did you mean adapter.alpha?",
    "lora_alpha": "did you mean adapter.alpha?",
    "max_train_steps": "did you mean train.steps? One step takes train.pairs_per_batch × train.accumulation "
    "pairs, and 1 pair is 2 images",
    "max_train_epochs": "did you mean train.epochs? One epoch takes every training pair once",
    "gradient_accumulation_steps": "did you mean train.accumulation?",
    "mixed_precision": "did you mean train.precision? It is bf16 unless you say otherwise",
    "resolution": "did you mean data.resolution?",
    "save_every_n_steps": "did you mean train.checkpoint_every? It counts steps",
    "output_dir": "did you mean train.output?",
    "output_name": "files are named by the trainer, and mapo-fast export writes other layouts: leave it out",
    "pretrained_model_name_or_path": "did you mean model.path?",
    "optimizer_type": 'did you mean optim.name? It is "adamw", "adamw8bit" or "adafactor"',
    "lr_scheduler": "did you mean optim.schedule?",
    "lr_warmup_steps": "did you mean optim.warmup_steps? It counts steps",
    "seed": "did you mean train.seed or preview.seed?",
    "gradient_checkpointing": "did you mean train.gradient_checkpointing?",
    "xformers": 'did you mean train.attention? Set it to "xformers", or leave it out: "sdpa" is torch\'s own '
    "and the default",
    "sdpa": 'did you mean train.attention? Leave it out: "sdpa" is the default',
    "cache_latents": "prepare always caches latents and prompt embeddings: leave it out",
    "train_data_dir": "did you mean data.source? A folder of pairs, chosen/ + rejected/: see docs/data.md",
    "noise_offset": "no objective here takes it: leave it out",
    "min_snr_gamma": 'did you mean train.min_snr_gamma? It counts with train.timestep_weights = "min_snr"',
    "beta_dpo": "did you mean objective.beta? It is Diffusion-DPO's with objective.name = \"dpo\"; MaPO's "
    "default is 0.1",
    "max_grad_norm": "did you mean optim.max_grad_norm?",
}


def _refused(tmp_path: Path, **parts: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL.format(**{"top": "", "data": "", "train": ""} | parts), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("key", LINES)
def test_a_key_of_another_trainer_gets_one_line(tmp_path: Path, key: str) -> None:
    line = LINES[key]
    assert _refused(tmp_path, top=f"{key} = 1") == f"unknown key {key} ({line})"
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{key}=1"])
    assert str(caught.value) == f"--set {key}=1: write it as section.key=value ({line})"
    with pytest.raises(UserError) as caught:
        load_config(None, [f"lora.{key}=1"])
    if foreign(key):
        assert f"unknown key lora.{key} ({line})" in str(caught.value)


def test_a_key_is_known_in_every_section_and_spelling(tmp_path: Path) -> None:
    line = LINES["learning_rate"]
    assert _refused(tmp_path, train="learning_rate = 1e-4") == f"unknown key train.learning_rate ({line})"
    assert _refused(tmp_path, data="Learning-Rate = 1e-4") == f"unknown key data.Learning-Rate ({line})"
    section = "[additional_arguments]\nlearning_rate = 1e-4\nfoo = 1\n"
    assert _refused(tmp_path, train=section) == f"unknown key additional_arguments.learning_rate ({line})"
    assert _refused(tmp_path, train="[objective]\nmin_snr_gamma = 5") == (
        f"unknown key objective.min_snr_gamma ({LINES['min_snr_gamma']})"
    )


def test_another_trainer_s_config_is_recognised_before_sections_are_missed() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"network_dim": 8, "network_alpha": 8, "max_grad_norm": 1.0})
    assert str(caught.value) == "config: " + "; ".join(
        f"unknown key {key} ({LINES[key]})" for key in ("network_dim", "network_alpha", "max_grad_norm")
    )


def test_a_key_of_another_section_is_named_with_it(tmp_path: Path) -> None:
    assert _refused(tmp_path, train="lr = 1e-5") == "unknown key train.lr (did you mean optim.lr?)"


def test_every_translation_is_a_setting_and_no_setting_is_hidden() -> None:
    names = {row.name for row in TABLE}
    assert {entry.ours for entry in FOREIGN} - {""} <= names
    assert len({entry.name for entry in FOREIGN}) == len(FOREIGN)
    hidden = {entry.name for entry in FOREIGN} & ({row.key for row in TABLE} | set(Config.model_fields))
    assert hidden == {
        "batch_size",
        "epochs",
        "min_snr_gamma",
        "optimizer",
    }  # written elsewhere: not ours


def test_the_rates_that_a_message_states_are_the_presets() -> None:
    rates = {name: preset_table(name)["optim"]["lr"] for name in PRESETS}
    assert rates.pop("full") == 1e-6
    assert set(rates.values()) == {1e-5}
    assert "1e-5 for a LoRA and 1e-6 for a full fine-tune" in RATES
