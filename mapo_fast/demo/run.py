"""The demo: prepare, train MaPO and an SFT control from the same start, sample, score, report.

Everything goes through the product's own `prepare` and `train`, with the two TOML files that are written
into the output folder; the user can run them again, change them, or point them at other data. MaPO sees the
chosen (red) and the rejected (blue) image of every pair, the SFT control only the chosen one: what MaPO
gains beyond it comes from the preference.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

import mapo_fast
from mapo_fast.data.prepare import prepare
from mapo_fast.demo import report, score, world
from mapo_fast.models.open import open_model
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.settings.load import load_config
from mapo_fast.settings.schema import Config, ObjectiveConfig
from mapo_fast.util.console import Terminal, say
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, write_json
from mapo_fast.util.signals import Interrupted
from mapo_kernels.objectives import objective_names

TINY_SDXL = Path(__file__).parent / "assets" / "tiny-sdxl"
"""The shipped pipeline folder, built by `mapo_fast.demo.build_tiny_sdxl`."""


SINGLE = "images.parquet"
"""File of the pairs' images one by one, each with a label, for an objective of single images."""
SOFT_LABEL = 0.9
"""Probability that the chosen image is the better one, for an objective that needs labels."""


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does; the tests run a smaller one."""

    pairs: int = 288
    """Preference pairs, about a tenth of them held out."""
    steps: int = 100
    """Optimizer steps of each of the two trainings."""
    samples: int = 288
    """Images per model and set of prompts."""
    sampling_steps: int = 12
    """Denoising steps per image."""


_CONFIG = """\
# Written by `mapo-fast demo`; paths are relative to this file. To run this training again on its own:
#   mapo-fast train {name} --set train.output=again-{objective}{overrides}

[model]
path = {model}

[data]
source = {source}
cache = "{cache}"{pad}# what `mapo-fast prepare {name}` writes
resolution = {side}
bucket_step = {side}
batch_size = 4         # images that go through the VAE together
held_out = 0.1

[objective]
name = "{objective}"{comment}

[adapter]
kind = "full"          # every UNet weight is trained

[optim]
lr = 5e-6              # small: the drawn preference is plain, and other prompts must not suffer
warmup_steps = {warmup}
max_grad_norm = 1.0

[train]
output = "{objective}"
steps = {steps}
pairs_per_batch = 4
precision = "fp32"
layout = "joint"
gradient_checkpointing = false
threads = 1            # more gain little on a model this small, and lose much where the cores are busy
seed = {seed}
log_every = {log_every}
checkpoint_every = 0   # only at the end
evaluate_every = {evaluate_every}
evaluate_pairs = 32
"""


def run_demo(
    out: Path,
    seed: int = 0,
    console: Console | None = None,
    *,
    size: DemoSize | None = None,
    objective: str = "mapo",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the whole demo into the new folder `out`; returns the contents of `report.json`.

    Args:
        objective: `objective.name` of the training that the SFT control is compared with.
        overrides: `section.key=value` for both trainings, for instance another memory plan.

    Raises:
        UserError: `out` exists and is not an empty folder, or an override is wrong.
    """
    if objective not in (known := objective_names()):
        raise UserError(f"--objective {objective!r} is not known: use one of {', '.join(known)}")
    return _run_demo(out, seed, Terminal(console), size or DemoSize(), objective, overrides)


def _run_demo(
    out: Path, seed: int, terminal: Terminal, size: DemoSize, objective: str, overrides: Sequence[str]
) -> dict[str, Any]:
    started, console = time.perf_counter(), terminal.console
    _new_folder(out)
    try:
        with disk_errors(out):
            configs = _configs(out, objective, seed, size, overrides)
    except UserError:
        shutil.rmtree(out, ignore_errors=True)  # it was empty: a wrong setting leaves no files
        raise
    folder = open_model(configs["sft"])
    seconds: dict[str, float] = {}

    def stage(name: str, title: str) -> None:
        seconds[name] = time.perf_counter()
        console.rule(f"[bold]{title}", align="left")

    torch.set_num_threads(1)  # as the configs say; `train` sets it too

    stage("prepare", "1/4  Draw preference pairs, encode them once")
    soft = configs[objective].objective.known.labels == "required"
    label = SOFT_LABEL if soft else None
    world.write_preference_set(out / "pairs", world.preference_pairs(size.pairs, seed), label)
    prepare(configs["sft"], callbacks=terminal)
    if configs[objective].objective.known.samples == "single":
        world.write_labelled_images(out / SINGLE, out / "pairs")
        prepare(configs[objective], callbacks=terminal)

    stage("train_sft", "2/4  Train the SFT control: the chosen images alone")
    _train(configs["sft"], terminal)
    names = report.model_names(objective)
    single = configs[objective].objective.known.samples == "single"
    against = "images one by one" if single else "chosen against rejected"
    stage(f"train_{objective}", f"3/4  Train with {names[objective]}: {against}")
    _train(configs[objective], terminal)

    stage("sample", "4/4  Sample before and after, with the same seeds, and score by rule")
    cells, prompts = _sample_all(out, names, folder, seed, size, console)
    now = time.perf_counter()
    begins = [*seconds.values(), now]
    stages = {name: round(begins[i + 1] - begins[i], 1) for i, name in enumerate(seconds)}
    result = _figures(cells, prompts) | {
        "objective": objective,
        "seconds": 0.0,
        "seconds_by_stage": stages,
        "seed": seed,
        "held_out": {model: _held_out(out / model) for model in ("sft", objective)},
        "warnings": {model: _warnings(out / model) for model in ("sft", objective)},
        "settings": asdict(size)
        | {
            "steps": configs[objective].train.steps,
            "guidance": score.GUIDANCE,
            "threads": torch.get_num_threads(),
        }
        | ({"set": list(overrides)} if overrides else {}),
        "versions": {
            "mapo_fast": mapo_fast.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    with disk_errors(out):
        report.write_picture(out / "report.png", result, cells, prompts)
        result["seconds"] = round(time.perf_counter() - started, 1)
        report.write_html(out / "report.html", result, cells, prompts, out)
    write_json(out / "report.json", result)
    _print_result(console, result, out)
    return result


def _new_folder(out: Path) -> None:
    with disk_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            held = "another demo's report" if (out / "report.json").exists() else "something else"
            raise UserError(f"--out {out} already holds {held}: choose another folder (nothing was changed)")
        out.mkdir(parents=True, exist_ok=True)


def _configs(
    out: Path, objective: str, seed: int, size: DemoSize, overrides: Sequence[str]
) -> dict[str, Config]:
    """Write and read the two config files; overrides of [objective] do not apply to the control."""
    if objective == "sft":
        raise UserError("--objective sft: the control is trained in any case; name another objective")
    fixed = [o for o in overrides if o.split("=")[0].strip() in ("train.output", "objective.name")]
    if fixed:
        raise UserError(f"--set {fixed[0]}: use --out and --objective")
    own = [override for override in overrides if not override.strip().startswith("objective.")]
    return {
        name: demo_config(out, name, seed, size, sets)
        for name, sets in ((objective, list(overrides)), ("sft", own))
    }


def demo_config(out: Path, objective: str, seed: int, size: DemoSize, overrides: Sequence[str]) -> Config:
    """Write one of the demo's config files into `out`, and read it."""
    return load_config(_write_config(out, objective, seed, size, overrides), overrides)


def _write_config(out: Path, objective: str, seed: int, size: DemoSize, overrides: Sequence[str]) -> Path:
    path = out / f"config_{objective}.toml"
    comments = {
        "mapo": '\nform = "code"          # as in the MaPO authors\' released code\nsnr = 0.5\n'
        "beta = 0.02            # theirs is 0.1: here the chosen images' error would rise with it",
        "sft": "           # the chosen image's denoising error alone",
    }
    paired = ObjectiveConfig(name=objective).known.samples == "pair"
    text = _CONFIG.format(
        source='"pairs"       # pairs.jsonl with prompt, chosen, rejected, and the images'
        if paired
        else f'"{SINGLE}"  # the same images one by one: prompt, image, label',
        cache="cache" if paired else "cache_single",
        pad=" " * (8 if paired else 1),
        name=path.name,
        model=json.dumps(TINY_SDXL.resolve().as_posix()),  # a JSON string is a TOML string
        side=world.SIDE,
        objective=objective,
        overrides="".join(f" --set {shlex.quote(override)}" for override in overrides),
        comment=comments.get(objective, ""),
        warmup=min(20, size.steps // 5),
        steps=size.steps,
        seed=seed,
        log_every=max(1, size.steps // 20),
        evaluate_every=max(1, size.steps // 4),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _train(config: Config, terminal: Terminal) -> None:
    result = fit(config, callbacks=terminal)
    if not result.finished:  # the trainer took the signal to save; the demo ends here
        raise Interrupted(result.signal, f"interrupted; {config.train.output} keeps what was trained")


def _sample_all(
    out: Path, names: dict[str, str], folder: Pipeline, seed: int, size: DemoSize, console: Console
) -> tuple[report.Cells, dict[str, score.Prompts]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = folder.load_vae().to(device)
    prompts = {
        name: score.make_prompts(
            folder, with_colour=name == "unchanged", count=size.samples, seed=seed, device=device
        )
        for name in ("preference", "unchanged")
    }
    cells: report.Cells = {name: {} for name in prompts}
    for model, title in names.items():
        unet = _load_unet(out / model, folder)
        unet = unet.to(device, memory_format=torch.channels_last)  # a fifth faster here
        say(console, f"{title}: {len(prompts)} × {size.samples} images")
        for name, asked in prompts.items():
            cells[name][model] = score.sample(unet, vae, folder, asked, size.sampling_steps)
    return cells, prompts


def _load_unet(run: Path, folder: Pipeline) -> Any:
    """A run's UNet, loaded as a user of diffusers would; the start model where there is no run."""
    if (run / "unet").exists():
        return UNet2DConditionModel.from_pretrained(run / "unet", local_files_only=True)
    unet = folder.load_unet()
    if (run / "lora").exists():
        name = "pytorch_lora_weights.safetensors"
        unet.load_lora_adapter(run / "lora", prefix="unet", weight_name=name, local_files_only=True)
    return unet


def _figures(cells: report.Cells, prompts: dict[str, score.Prompts]) -> dict[str, Any]:
    rules = {
        "preferred_share": ("preference", score.preferred),
        "unchanged_score": ("unchanged", score.correct),
    }
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for figure, (name, rule) in rules.items():
        shares = {model: score.share(cells[name][model], prompts[name], rule) for model in cells[name]}
        figures[figure] = {model: value for model, (value, _) in shares.items()}
        intervals[figure] = {model: list(interval) for model, (_, interval) in shares.items()}
    return {
        **figures,
        "intervals_95": intervals,
        "samples_per_cell": {figure: len(prompts[name].seeds) for figure, (name, _) in rules.items()},
        "colours": {
            model: score.colour_shares(samples.readings) for model, samples in cells["preference"].items()
        },
    }


def _held_out(run: Path) -> dict[str, Any]:
    """The last held-out changes of a run by name, with their 95 % intervals; empty without held-out pairs."""
    entries = [one for one in read_log(run / "log.jsonl") if one["event"] == "evaluation"]
    return {key: value for key, value in (entries[-1] if entries else {}).items() if key.endswith("_change")}


def _warnings(run: Path) -> list[dict[str, Any]]:
    """Step and message of each warning that the trainer gave in a run."""
    entries = read_log(run / "log.jsonl")
    return [{key: one[key] for key in ("step", "message")} for one in entries if one["event"] == "warning"]


def _print_result(console: Console, result: dict[str, Any], out: Path) -> None:
    table = Table(title="share of images, 95 % interval", title_justify="left")
    table.add_column("prompts")
    names = report.model_names(result["objective"])
    for name in names.values():
        table.add_column(name, justify="right")
    for figure, name in report.FIGURE_NAMES.items():
        cells = [report.percent(result, figure, model) for model in names]
        table.add_row(name, *cells)
    console.print(table)
    for model, found in result["warnings"].items():
        for one in found:
            say(
                console, f"{names[model]}, step {one['step']}: the trainer warned: {one['message']}", "yellow"
            )
    say(console, f"Report: {out / 'report.html'}   ({result['seconds']:.0f} s in all)")
    console.print("\n[bold]Next, your own pairs[/bold] (formats: docs/data.md):")
    say(console, f"  {report.next_command()}")
