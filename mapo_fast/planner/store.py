"""Traces on disk, so that a plan that was asked for once is there at once.

A trace is kept under a digest of everything it depends on: the sources of engine, kernels and planner, the
versions of torch, diffusers, peft and bitsandbytes, the UNet's config and the settings. It serves every card.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import mapo_kernels
from mapo_fast.config import Config
from mapo_fast.planner.trace import Mark, Trace, record_step

_ARRAYS = ("kinds", "flops", "nbytes", "links", "live", "kept")


def folder() -> Path:
    """The user's cache folder for traces."""
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(local or Path.home() / ".cache") / "mapo_fast" / "traces"


def traces(configs: Sequence[Config], unet_config: dict[str, Any], *, settled: bool = True) -> list[Trace]:
    """The traces of these configs, from disk or made now, two at a time; see `record_step`."""
    paths = [folder() / f"{_digest(config, unet_config, settled)}.npz" for config in configs]
    found = [_read(path) for path in paths]
    missing = [i for i, trace in enumerate(found) if trace is None]
    work = [(configs[i].model_dump_json(), unet_config, settled) for i in missing]
    made: list[Trace] = []
    if len(work) > 1 and (os.cpu_count() or 1) > 1 and not multiprocessing.current_process().daemon:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with suppress(BrokenProcessPool), _no_main(), ProcessPoolExecutor(2, mp_context=context) as pool:
            made = list(pool.map(_record, work))
    made = made or [_record(one) for one in work]
    for i, trace in zip(missing, made, strict=True):
        _write(paths[i], trace)
        found[i] = trace
    return [trace for trace in found if trace is not None]


@contextmanager
def _no_main() -> Iterator[None]:
    """Spawned processes run the user's script again, which may have no guard, unless they know of none."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _record(work: tuple[str, dict[str, Any], bool]) -> Trace:
    text, unet_config, settled = work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations
        return record_step(Config.model_validate_json(text), unet_config, settled=settled)


def _digest(config: Config, unet_config: dict[str, Any], settled: bool) -> str:
    table = config.model_dump(mode="json", include={"adapter", "objective", "offload", "optim"})
    table["train"] = config.train.model_dump(
        mode="json",
        include={
            "pairs_per_batch", "accumulation", "precision", "layout", "gradient_checkpointing", "fused_step",
            "attention",
        },
    )  # fmt: skip
    table["optim"].pop("lr")
    table["speed"] = config.speed.model_dump(mode="json", include={"fused_ops", "channels_last"})
    first_step = config.offload.optimizer == "cpu" and not settled
    parts = [
        first_step,
        table,
        [config.data.resolution, config.data.max_tokens],
        sorted(unet_config.items(), key=str),
        _sources(),
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _sources() -> list[str]:
    """Digests of the sources and versions that a trace depends on."""
    here, kernels = Path(__file__).parent, Path(mapo_kernels.__file__).parent
    files = [
        *kernels.glob("*.py"),
        *(here.parent / "engine").glob("*.py"),
        *(here / name for name in ("costs.py", "recorder.py", "trace.py")),
        *(here.parent / name for name in ("fuse.py", "lora.py", "loss.py", "objectives.py")),
    ]
    texts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
    versions = []
    for package in ("torch", "diffusers", "peft", "bitsandbytes", "triton"):
        try:
            public, *_ = metadata.version(package).split(
                "+"
            )  # one trace serves torch's builds for all devices
            versions.append(f"{package} {public}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return texts + versions


def _read(path: Path) -> Trace | None:
    """None where there is no whole file; a damaged one is made again."""
    try:
        with np.load(path) as file:
            rest = json.loads(str(file["rest"]))
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    marks = [Mark(*mark) for mark in rest.pop("marks")]
    return Trace(**arrays, marks=marks, **rest)


def _write(path: Path, trace: Trace) -> None:
    """Without a word where the folder cannot be written: it is a cache."""
    fields = trace._asdict()
    rest = json.dumps({name: value for name, value in fields.items() if name not in _ARRAYS})
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, rest=rest, **{name: fields[name] for name in _ARRAYS})
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
