"""`mapo-fast doctor`: what this machine will use for training, why, and what to install for more.

Needs the base install only: every other package is looked up and may be missing or broken, and then its line
says so. Where the command line (`mapo_fast[train]`) is not installed, `python -m mapo_fast.doctor` works.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapo_fast import __version__
from mapo_fast.hardware.driver import driver, why_no_gpu
from mapo_fast.hardware.holders import gpus, held_text
from mapo_fast.util.console import say
from mapo_fast.util.errors import printable

_TRAIN = 'pip install "mapo_fast[train]"'
_PACKAGES: tuple[tuple[str, str], ...] = (
    ("torch", ""),
    ("safetensors", ""),
    ("triton", "on Linux: pip install triton; other systems use the eager path"),
    ("diffusers", _TRAIN),
    ("transformers", _TRAIN),
    ("peft", f"{_TRAIN}, for LoRA"),
    ("accelerate", _TRAIN),
    ("bitsandbytes", f"{_TRAIN}, for adapter.base = 'int8', 'nf4' and 'fp8'"),
    ("tensorboard", f"{_TRAIN}; without it figures go to log.jsonl only"),
    ("pyarrow", f"{_TRAIN}, for parquet data"),
    ("datasets", f"{_TRAIN}, for Hugging Face dataset folders"),
    ("xformers", 'optional: pip install "mapo_fast[xformers]" for train.attention = "xformers"'),
)


class Line(NamedTuple):
    """One finding."""

    section: str
    label: str
    text: str


def doctor(console: Any = None, model: Path | None = None) -> None:
    """Print the findings to a `rich.console.Console`, or to standard output for None.

    Args:
        console: where to.
        model: a model's file or folder, to say what it is.

    Raises:
        UserError: the model cannot be trained, and why.
    """
    section = ""
    for line in examine() if model is None else _of_model(model):
        if line.section != section:
            section = line.section
            _show(console, "")
            _show(console, section, style="bold")
        _show(console, f"  {line.label + ':':<22}{line.text}")


def examine() -> list[Line]:
    """Gather all findings; a probe that fails becomes a line that says how."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [Line("System", label, _probed(probe)) for label, probe in _system(device)]
    for name, hint in _PACKAGES:
        lines.append(Line("Packages", name, _probed(functools.partial(_package, name, hint))))
    lines.append(Line("Packages", "kernels", _probed(_kernels_package)))
    lines += [Line("Will be used", label, _probed(probe)) for label, probe in _choices(device)]
    return lines


def _of_model(path: Path) -> list[Line]:
    from mapo_fast.models.describe import describe  # needs more than the base install

    return [Line("Model", label, text) for label, text in describe(path)]


def _system(device: str) -> list[tuple[str, Callable[[], str]]]:
    return [
        ("mapo_fast", lambda: f"{__version__} ({Path(__file__).parent})"),
        ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform),
        ("gpu", _gpu if device == "cuda" else lambda: f"none that torch can use: {why_no_gpu()}"),
        *([("gpu memory", _held)] if device == "cuda" else []),
        (
            "cpu",
            lambda: f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads (train.threads)",
        ),
        ("memory", _memory),
        ("disk", lambda: f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in {Path.cwd()}"),
    ]


def _choices(device: str) -> list[tuple[str, Callable[[], str]]]:
    return [
        ("device", lambda: f"{device} (train.device = 'auto')"),
        ("loss kernels", lambda: _loss_kernels(device)),
        ("bf16", lambda: _bf16(device)),
        ("attention", lambda: _attention(device)),
        ("xformers attention", lambda: _xformers(device)),
        ("8-bit AdamW", lambda: _eight_bit(device)),
    ]


def _probed(probe: Callable[[], str]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except Exception as error:
        return f"cannot be used: {_first_line(error)}"


def _package(name: str, hint: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"not installed ({hint})"
    if name == "torch":
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        return f"{torch.__version__} ({build} build)"
    return version


def _kernels_package() -> str:
    """Hugging Face's package `kernels`, which a folder of that name must never replace."""
    spec = importlib.util.find_spec("kernels")
    try:
        distribution = metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        return "not installed (optional, Hugging Face's; the folder kernels/ here is not a package)"
    inside = Path(str(distribution.locate_file("kernels"))).resolve()
    if spec is not None and spec.origin is not None and inside in Path(spec.origin).resolve().parents:
        return f"{distribution.version} (Hugging Face's)"
    where = spec.origin or list(spec.submodule_search_locations or []) if spec is not None else "nothing"
    return (
        f"{distribution.version} is SHADOWED by {where}: diffusers and transformers would import that "
        "instead; rename it, or start from another folder"
    )


def _gpu() -> str:
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return "; ".join(found) + f"; driver {driver() or 'unknown'}"


def _held() -> str:
    """Other programs that hold memory of the GPUs."""
    found = gpus()
    if not found:
        return f"unknown who holds it (nvidia-ml-py is missing: {_TRAIN})"
    return "; ".join(held_text(gpu) or "no other program holds any" for gpu in found)


def _memory() -> str:
    if importlib.util.find_spec("psutil") is None:
        return f"unknown (psutil is missing: {_TRAIN})"
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def _loss_kernels(device: str) -> str:
    from mapo_kernels.hardware import backend

    return str(backend(device))


def _bf16(device: str) -> str:
    if device == "cpu":
        return "yes, but slow on processors without AVX512-BF16 or AMX (train.precision = 'fp32' on the CPU)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "yes (train.precision = 'bf16')"
    return "no: this card is too old; train.precision = 'fp16' with adapter.kind = 'lora', or 'fp32'"


def _attention(device: str) -> str:
    """Try each SDPA back end on a small attention of SDXL's head size."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device == "cuda":
        names |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    native = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    query = torch.zeros(2, 2, 64, 64, device=device, dtype=torch.bfloat16 if native else torch.float16)
    works = []
    for name, choice in names.items():
        try:
            with sdpa_kernel(choice):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
            works.append(name)
        except RuntimeError:
            continue
    missing = sorted(names.keys() - set(works))
    text = f"SDPA (train.attention = 'sdpa'), torch picks per call among: {', '.join(works)}"
    return text + (f"; not available here: {', '.join(missing)}" if missing else "")


def _xformers(device: str) -> str:
    if importlib.util.find_spec("xformers") is None:
        return 'no: not installed (pip install "mapo_fast[xformers]"); SDPA is as good on recent torch'
    if device == "cpu":
        return "no: it has no CPU attention"
    from xformers.ops import memory_efficient_attention

    query = torch.zeros(1, 64, 2, 64, device=device, dtype=torch.float16)
    memory_efficient_attention(query, query, query)
    return "works (train.attention = 'xformers')"


def _eight_bit(device: str) -> str:
    """Try one step of AdamW8bit, on a tensor large enough to have 8-bit states.

    Not through torch's optimizers or custom operators: these import its compiler, which takes as long as all
    else here.
    """
    from mapo_kernels.hardware import backend
    from mapo_kernels.ops import adamw8bit

    weight, lr = torch.zeros(4096, device=device), torch.tensor(1e-3, device=device)
    state = adamw8bit.new_state(weight)
    first, second, most1, most2, steps = (
        [state[name]] for name in ("state1", "state2", "absmax1", "absmax2", "step")
    )
    grads = [torch.ones_like(weight)]
    tensors = adamw8bit.Tensors([weight], grads, first, second, most1, most2, steps, [0])
    settings = adamw8bit.Settings(lr, None, None, None, 0.9, 0.999, 1e-8, 0.01, None)  # type: ignore[attr-defined]
    adamw8bit.take_step(tensors, settings, adamw8bit.make_plan)  # type: ignore[attr-defined]
    if state["state1"].dtype != torch.uint8 or not bool((weight < 0).all()):
        return "cannot be used: it took a step without changing the weights as it should"
    place = "GPU" if device == "cuda" else "CPU"
    return f"works on this {place} (optim.name = 'adamw8bit'): {backend(device).reason}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _show(console: Any, text: str, style: str | None = None) -> None:
    if console is None:
        print(printable(text))
    else:
        say(console, text, style)


if __name__ == "__main__":
    doctor()
