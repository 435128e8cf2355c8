"""Settings: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mapo_fast.engine.objectives import build_loss
from mapo_fast.settings.load import load_config
from mapo_fast.util.errors import UserError

MEAN = {"reduction": "mean"}
MINIMAL = """
[model]
path = "base"
[data]
cache = "cache"
[train]
output = "run"
"""


def _write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_in_the_file_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path))
    assert config.model.path == tmp_path / "base"
    assert config.data.cache == tmp_path / "cache"
    assert config.train.output == tmp_path / "run"
    assert config.data.source is None


def test_overrides_replace_values_with_toml_types(tmp_path: Path) -> None:
    config = load_config(
        _write(tmp_path),
        ["optim.lr=1e-6", "objective.name=sft", "data.flip=true", "adapter.targets=['to_q']", "model.path=x"],
    )
    assert config.optim.lr == 1e-6
    assert config.objective.name == "sft"
    assert config.data.flip is True
    assert config.adapter.targets == ("to_q",)
    assert config.model.path == Path("x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", r"unknown key train\.stps \(did you mean train\.steps\?\)"),
        ("optimizer.lr=1", r"unknown key optimizer \(did you mean optim\?\)"),
        ("optim.zzzzzz=1", r"unknown key optim\.zzzzzz \(valid: name, lr"),
        ("optim.lr='fast'", r"optim\.lr = 'fast'"),
        ("optim.lr=-1", r"optim\.lr = -1.*greater than 0"),
        ("train.steps=0", r"train\.steps = 0"),
        ("train.layout='both'", r"train\.layout = 'both'.*'joint', 'split' or 'sequential'"),
        ("data.max_tokens=100", r"data\.max_tokens = 100.*77, 150 or 225"),
        ("data.resolution=1020", r"data\.resolution = 1020.*multiple of 8"),
        ("optim.betas=[0.9,1.0]", r"betas must both be in \[0, 1\)"),
        ("optim.weight_decay=true", r"optim\.weight_decay = True"),
        ("train.keep_checkpoints=true", r"train\.keep_checkpoints = True"),
        ("train.steps='2'", r"train\.steps = '2'"),
        ("data.flip=1", r"data\.flip = 1"),
        ("train.gradient_checkpointing='yes'", r"train\.gradient_checkpointing = 'yes'"),
        ("objective.beta=inf", r"objective\.beta = "),
        ("optim.eps=inf", r"optim\.eps = "),
        ("optim.lr=nan", r"optim\.lr = "),
        ("train.steps=1e20", r"train\.steps = "),
        ("train.threads=100000000000", r"train\.threads = "),
        ("preview.seed=99999999999999999999", r"preview\.seed = "),
        ("train.seed=99999999999999999999", r"train\.seed = "),
        ("train.steps=1000000000", r"train\.steps = 1000000000.*less than or equal to"),
        ("train.accumulation=1000000000000", r"train\.accumulation = .*less than or equal to"),
        ("train.pairs_per_batch=1000000", r"train\.pairs_per_batch = .*less than or equal to"),
        ("train.evaluate_pairs=100000000", r"train\.evaluate_pairs = .*less than or equal to"),
        ("train.evaluate_draws=1001", r"train\.evaluate_draws = .*less than or equal to"),
        ("adapter.rank=1000000000", r"adapter\.rank = 1000000000.*less than or equal to"),
        ("optim.warmup_steps=1000000000000", r"optim\.warmup_steps = .*less than or equal to"),
        ("preview.steps=1001", r"preview\.steps = .*less than or equal to"),
        ("data.batch_size=100000", r"data\.batch_size = .*less than or equal to"),
        ("data.bucket_step=1000000", r"data\.bucket_step = .*less than or equal to"),
        ("objective.beta=1e300", r"objective\.beta = 1e\+300 must be at most 1e\+09"),
        ("optim.weight_decay=1e5", r"lr \* weight_decay = 1 must be below 1"),
        (f"train.steps={'9' * 5000}", r"train\.steps = '9{90,}\.\.\.9{90,}"),
        (f"train.steps={'9' * 4000}", r"train\.steps = 9{90,}\.\.\.9{90,}"),
        (f"optim.lr=1{'0' * 400}", r"optim\.lr = 10{90,}\.\.\.0"),
        (f"data.resolution={'9' * 400}", r"data\.resolution = 9{90,}\.\.\.9{90,}.* multiple of 8, such as"),
        (f"train.steps={'[' * 1500}", r"train\.steps = '\[{90,}\.\.\.\["),
        ("optim.betas=[0.9]", r"optim\.betas = \[0\.9\] has too few values"),
        ("train.wandb='a/b'", r"train\.wandb = 'a/b'"),
        (
            "objective.name=dpo adapter.kind=full train.steps=10000000 train.accumulation=16",
            r"'precomputed' would compute 320,000,000 errors",
        ),
        ("train.output=~no-such-user/run", r"train\.output = '~no-such-user/run': no home folder"),
        ("train.output=", r"train\.output is empty"),
        ('model.vae="a\\u0000b"', r"model\.vae = 'a\\x00b' has a NUL"),
        ("data.source=\udcff", r"data\.source = '\\udcff' is not valid UTF-8"),
        ('preview.prompts=["a\udcff"]', r"\[\"a\\+udcff\"\].* is not valid UTF-8: write it anew$"),
        ("train.output=2020-01-01", r"2020-01-01 is a date"),
        ("objective.form=paper", r"objective\.beta must be set .* 8 for general"),
        ("objective.form=paper objective.name=dpo", r"form = 'paper' is of objective\.name = 'mapo'"),
        ("objective.name=ppo", r"objective\.name = 'ppo'.*'linear_dpo'"),
        (
            "objective.name=dpo objective.desirable_weight=2",
            r"desirable_weight is not a setting of .* = 'dpo'",
        ),
        (
            "objective.name=kto objective.undesirable_weight=0",
            r"undesirable_weight = 0 must be greater than 0$",
        ),
        (
            "objective.name=dpo objective.snr=0.5",
            r"objective\.snr is not a setting of .* = 'dpo', which has beta$",
        ),
        ("objective.name=dmpo objective.eta=0.1", r"objective\.eta .* 'dmpo', which has beta, alpha$"),
        ("objective.gamma=1", r"objective\.gamma is not a setting of .* = 'mapo', which has beta, snr$"),
        (
            "objective.name=sft objective.beta=2",
            r"objective\.beta is not a setting of .* 'sft', which has none$",
        ),
        (
            "objective.form=paper objective.beta=8 objective.snr=1",
            r"objective\.snr is not a .* with objective\.form = 'paper', which has beta$",
        ),
        ("objective.reading=scale", r"reading = 'scale' is of objective\.form = 'paper': leave it out$"),
        ("objective.form=paper objective.name=sft", r"form = 'paper' is of objective\.name = 'mapo'"),
        ("objective.name=dmpo objective.alpha=1", r"objective\.alpha = 1 must be between 0 and 1$"),
        ("objective.beta=0", r"objective\.beta = 0 must be greater than 0$"),
        ("objective.reference=adapter", r"'mapo' compares with no reference model: leave it out$"),
        ("objective.name=dpo adapter.kind=full objective.reference=adapter", "use 'precomputed' or 'copy'$"),
        ("objective.name=dpo objective.reference=copy", "use 'adapter' or 'precomputed'$"),
        ("train", "write it as section.key=value"),
        ("a.b.c=1", "write it as section.key=value"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(_write(tmp_path), override.split())
    assert "\n" not in str(caught.value)


def test_numbers_that_are_whole_may_be_written_so(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path), ["optim.weight_decay=0", "objective.beta=2", "preview.guidance=7"])
    assert (config.optim.weight_decay, config.objective.beta, config.preview.guidance) == (0.0, 2.0, 7.0)


def test_settings_of_an_objective_are_its_own_and_have_its_defaults(tmp_path: Path) -> None:
    def settings(*overrides: str) -> dict[str, object]:
        objective = load_config(_write(tmp_path), list(overrides)).objective
        defaults = {name: setting.default for name, setting in objective.known.settings.items()}
        return {**defaults, **build_loss(objective, 500)._settings}

    assert settings() == {
        "objective": "mapo_code",
        "beta": 0.1,
        "snr": 0.5,
        "num_train_timesteps": 500,
        **MEAN,
    }
    assert settings("objective.name=npo") == {"objective": "npo", "beta": 2000.0, **MEAN}
    assert settings("objective.name=npo", "objective.beta=3")["beta"] == 3.0
    given = settings("objective.name=simpo", "objective.gamma=-1")
    assert given == {"objective": "simpo", "beta": 250.0, "gamma": -1.0, **MEAN}


def test_the_reference_follows_from_what_is_trained(tmp_path: Path) -> None:
    def reference(*overrides: str) -> str | None:
        return load_config(_write(tmp_path), list(overrides)).reference

    assert reference() is None
    assert reference("objective.name=dpo") == "adapter"
    assert reference("objective.name=ipo", "objective.reference=precomputed") == "precomputed"
    assert reference("objective.name=dpo", "adapter.kind=full") == "precomputed"
    assert reference("objective.name=dpo", "adapter.kind=full", "objective.reference=copy") == "copy"


def test_polynomial_needs_room_above_its_end(tmp_path: Path) -> None:
    settings = ["optim.schedule=polynomial", "optim.lr=1e-7"]
    with pytest.raises(UserError, match="ends at 1e-7: lr must be above it"):
        load_config(_write(tmp_path), settings)


def test_a_home_folder_is_expanded_everywhere(tmp_path: Path) -> None:
    text = MINIMAL.replace('"cache"', '"~/cache"')
    config = load_config(_write(tmp_path, text), ["model.path=~/model"])
    assert config.data.cache == Path.home() / "cache"
    assert config.model.path == Path.home() / "model"


def test_fp16_is_for_lora_only(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path), ["train.precision=fp16"]).adapter.kind == "lora"
    with pytest.raises(UserError, match=r"fp16.*lora.*only"):
        load_config(_write(tmp_path), ["train.precision=fp16", "adapter.kind=full"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "not valid TOML"),
        ("[model]\npath = 'x'\n[train]\noutput = 'y'\n", "data is missing"),
        ("[model]\npath = 3\n[data]\ncache='c'\n[train]\noutput = 'y'\n", r"model\.path = 3"),
        ("model = 1\n", "model = 1"),
        (MINIMAL.replace('"run"', '"~no-such-user/run"'), r"train\.output = '~no-such-user/run': no home"),
        (MINIMAL.replace('"run"', '"a\\u0000b"'), r"train\.output = 'a\\x00b' has a NUL"),
        (MINIMAL.replace('"run"', '""'), r"train\.output is empty"),
        (MINIMAL.replace('"run"', "2020-01-01"), r"2020-01-01 is a date"),
        (f"{MINIMAL}steps = {'9' * 5000}\n", r"config\.toml is not valid TOML: .* 5000 digits"),
        (f"{MINIMAL}steps = {'[' * 1500}\n", r"config\.toml is not valid TOML: it is nested too deeply"),
        (f"{MINIMAL}steps = {'{a=' * 1500}\n", r"config\.toml is not valid TOML: it is nested too deeply"),
        (f"{MINIMAL}steps = {'[' * 300}{']' * 300}\n", r"config\.toml: .*recursion limit"),
        (f"{MINIMAL}{'a.' * 30000}b = 1\n", r"config\.toml is not valid TOML: it is nested too deeply"),
        (f"{MINIMAL}{'#' * 2**20}\n", r"config\.toml: it is larger than the limit of 1,048,576 bytes"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path, text))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(path).train.output == tmp_path / "run"


def test_a_value_with_a_line_break_sets_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.steps = '3\\ntrain\.foo = 4'"):
        load_config(_write(tmp_path), ["train.steps=3\ntrain.foo = 4"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs and devices like these")
def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    """Without waiting for a writer, or reading for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        tmp_path: "it is a folder",
        tmp_path / "fifo": "it is a FIFO",
        Path("/dev/zero"): "it is a device",
        tmp_path / "loop": "symbolic links",
        tmp_path / ("x" * 300): "name too long",
    }
    for path, reason in cases.items():
        with pytest.raises(UserError, match=f"(?i){reason}") as caught:
            load_config(path)
        assert caught.value.exit_code == 2


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found: .*nothing\.toml"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.toml"):
        load_config(tmp_path / "b.toml")
