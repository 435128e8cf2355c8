"""Traces on disk, so that a repeated question is answered at once.

A trace is kept under a digest of everything it depends on: the sources of engine, kernels and planner, the
versions of torch, diffusers, peft and bitsandbytes, the UNet's config and the settings. It serves every card.
Those of the presets are shipped (`shipped_traces`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import mapo_kernels
from mapo_fast.planner import shipped_traces
from mapo_fast.planner.replay import Replays
from mapo_fast.planner.trace import Trace, record_step
from mapo_fast.planner.trace_file import pack, unpack
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, open_regular

Progress = Callable[[int, int], None]
_Work = tuple[Path, str, dict[str, Any], bool]


def no_progress(made: int, asked: int) -> None:
    """Tell nobody."""


def folder() -> Path:
    """The user's cache folder for traces."""
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(local or Path.home() / ".cache") / "mapo_fast" / "traces"


def traces(configs: Sequence[Config], unet_config: dict[str, Any]) -> list[Trace]:
    """The traces of these configs, from disk or made now, two at a time; see `record_step`."""
    with closing(Tracing()) as tracing:
        return list(tracing.traces(configs, unet_config))


class Tracing:
    """Makes traces in this process and in one other, which starts when there is work for two.

    Importing torch and diffusers takes as long as half a trace: the other one serves until `close`.
    """

    def __init__(
        self,
        *,
        kernels: bool = True,
        progress: Progress = no_progress,
        keep: bool = False,
        shipped: bool = True,
    ) -> None:
        """Start no process yet.

        Args:
            progress: told how many traces are made, of how many that have been asked for.
            keep: traces in memory too, in `kept`, for many questions in turn.
            shipped: use the shipped traces.
        """
        self.kernels, self.progress, self.keep, self.shipped = kernels, progress, keep, shipped
        self.replays = Replays()
        self.kept: dict[str, Trace] = {}
        """Traces by their name among the shipped ones."""
        self.made = self.asked = 0
        self._pool: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """End the other process, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def traces(self, configs: Sequence[Config], unet_config: dict[str, Any]) -> Generator[Trace, None, None]:
        """Yield traces one after the other; later ones are not made once the iterator is dropped."""
        names = [shipped_traces.name(config, unet_config, self.kernels) for config in configs]
        paths = [folder() / f"{digest(config, unet_config, self.kernels)}.xz" for config in configs]
        known = map(self._known, names, paths)
        found = {i: trace for i, trace in enumerate(known) if trace is not None}
        work = {
            i: (path, configs[i].model_dump_json(), unet_config, self.kernels)
            for i, path in enumerate(paths)
            if i not in found
        }
        futures = self._begin(dict(list(work.items())[1:]))
        self.asked += len(work)
        self.progress(self.made, self.asked)
        try:
            for i in range(len(configs)):
                while i not in found:
                    future = futures.get(i)
                    here = i if future is None else None if future.done() else _taken_back(futures)
                    if here is not None:
                        futures.pop(here, None)
                        found[here] = _record(work[here])
                        continue
                    with suppress(
                        Exception
                    ):  # it may lack registrations of this process; real errors occur here too
                        found[i] = futures.pop(i).result()
                found[i] = found[i]._replace(accumulation=configs[i].train.accumulation)
                if self.keep:
                    self.kept[names[i]] = found[i]
                if i in work:
                    self.made += 1
                    self.progress(self.made, self.asked)
                yield found.pop(i)
        finally:
            for future in futures.values():
                future.cancel()

    def _known(self, name: str, path: Path) -> Trace | None:
        return self.kept.get(name) or _read(path) or (shipped_traces.find(name) if self.shipped else None)

    def _begin(self, work: dict[int, _Work]) -> dict[int, Future[Trace]]:
        if not work or (os.cpu_count() or 1) == 1 or multiprocessing.current_process().daemon:
            return {}
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with suppress(BrokenProcessPool), _no_main(), _safe_path():
            self._pool = self._pool or ProcessPoolExecutor(1, mp_context=context)
            return {i: self._pool.submit(_record, one) for i, one in work.items()}
        return {}


def _taken_back(futures: dict[int, Future[Trace]]) -> int | None:
    """The last trace that the other process has not begun."""
    return next((i for i in reversed(futures) if futures[i].cancel()), None)


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the user's script from spawned processes, which would run it again if it has no main guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _safe_path() -> Iterator[None]:
    """Start new processes with safe-path: `python -c` would look for modules in the current folder first."""
    stated = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if stated is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = stated


def _record(work: _Work) -> Trace:
    path, text, unet_config, kernels = work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations
        trace = record_step(Config.model_validate_json(text), unet_config, kernels=kernels)
    _write(path, trace)
    return trace


def digest(config: Config, unet_config: dict[str, Any], kernels: bool) -> str:
    """A trace's name: a digest of everything that it depends on."""
    parts = [
        shipped_traces.name(config, unet_config, kernels),
        _sources(),
        _source_of(OPTIMIZERS[config.optim.name].build),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


_THIS_PROCESS = uuid.uuid4().hex


def _source_of(entry: str) -> str:
    """Digest of the file of a registry's "module:NAME"; without a file, an id of this process."""
    file = getattr(importlib.import_module(entry.partition(":")[0]), "__file__", None)
    return _THIS_PROCESS if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


_MODEL_SOURCES = ("fp8.py", "lora.py", "patch.py", "quantise.py")


def _sources() -> list[str]:
    """Digests of the sources and versions that a trace depends on."""
    here, kernels = Path(__file__).parent, Path(mapo_kernels.__file__).parent
    files = [
        *kernels.rglob("*.py"),
        *(here.parent / "engine").glob("*.py"),
        *(here / name for name in ("costs.py", "recorder.py", "trace.py")),
        *(here.parent / "models" / name for name in _MODEL_SOURCES),
        here.parent / "loss.py",
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
    """Read a trace; None where there is no whole file, and a damaged one is made again."""
    try:
        with open_regular(path) as opened:
            return unpack(opened.read())
    except (OSError, UserError):
        return None


def _write(path: Path, trace: Trace) -> None:
    """Write a trace; errors are ignored, because the folder is a cache."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(pack(trace))
