"""Kill `prepare` and `train` at random moments, many times; their results must not differ by a bit.

    python -m bench.kills [--append] [--kills N] [--seed S]

Tiny SDXL on the CPU. A run is started, killed (SIGKILL) at a random moment, resumed, killed again, until it
ends. Then all that it made is compared with an uninterrupted run's, and a new run is begun, until N kills of
`prepare` and N of `train` have been made. Every process is forked from this one, which has imported
everything, so none spends seconds on imports. With --append the rows go to bench/results/kills.jsonl.

Compared are all files of a cache, and of a run its result, its checkpoints, the start model's errors and the
figures of its log. A file too many, such as a temporary one that a kill left, is a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.environment import environment
from mapo_fast.data import scan, shards
from mapo_fast.data.prepare import prepare
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.engine import reference
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config

RESULTS = Path(__file__).parent / "results" / "kills.jsonl"
KILLS = 150
PAIRS, SIDE = 12, 32
KINDS: dict[str, dict[str, Any]] = {
    "train, LoRA": {"adapter": {"kind": "lora", "rank": 4}, "optim": {"name": "adamw8bit", "lr": 1e-3}},
    "train, full, with reference errors": {"adapter": {"kind": "full"}, "objective": {"name": "dpo"}},
}

Work = Callable[[Path], None]
"""Starts a run in a folder, or continues the one that is there."""
Contents = Callable[[Path], Mapping[str, str]]
"""Results of a run: name → digest."""


def campaign(
    work: Work,
    contents: Contents,
    expected: Mapping[str, str],
    kills: int,
    folder: Path,
    chance: random.Random,
) -> dict[str, Any]:
    """Kill `work` this many times and compare the final results of the killed runs.

    Args:
        work: what is done in the processes.
        contents: what is compared.
        expected: an uninterrupted run's.
        kills: at least so many; a run that was begun is finished.
        folder: for the runs, one after the other.
        chance: draws the moments.

    Returns:
        Counts (`file_counts`: how many different numbers of files kills left), and for the runs that made
        something else the names of the files.

    Raises:
        RuntimeError: a process failed by itself.
    """
    run, whole = folder / "run", _seconds(lambda: work(folder / "undisturbed"))
    counts: Counter[str] = Counter(kills=0, runs=0, starts=0)
    file_counts: set[int] = set()
    differing: dict[str, list[str]] = {}
    while counts["kills"] < kills:
        shutil.rmtree(run, ignore_errors=True)
        killed = 0
        while True:
            counts["starts"] += 1
            if not _killed(lambda: work(run), chance.uniform(0.0, 1.1 * whole)):
                break
            killed += 1
            file_counts.add(sum(path.is_file() for path in run.rglob("*")))
        if not killed:
            continue
        counts["kills"] += killed
        counts["runs"] += 1
        made = contents(run)
        if made != expected:
            names = made.keys() | expected.keys()
            differing[f"run {counts['runs']}"] = sorted(n for n in names if made.get(n) != expected.get(n))
    return {
        **counts,
        "file_counts": len(file_counts),
        "identical": counts["runs"] - len(differing),
        "differing": differing,
    }


def _seconds(work: Callable[[], None]) -> float:
    began = time.monotonic()
    _killed(work, 1e9)
    return time.monotonic() - began


def _killed(work: Callable[[], None], after: float) -> bool:
    """Start `work` in a process and kill it after so many seconds; whether the kill came before its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    end, ended, status = time.monotonic() + after, 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise RuntimeError("a process failed by itself, its error is above")
    return False


def settings(folder: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    """A short run, or its cache, in a folder of its own."""
    table: dict[str, Any] = {
        "model": {"path": str(TINY_SDXL)},
        "data": {
            "source": str(folder / "pairs"),
            "cache": str(folder / "cache"),
            "resolution": SIDE,
            "bucket_step": SIDE,
            "held_out": 0.2,
            "flip": True,
            "batch_size": 3,
        },
        "train": {
            "output": str(folder / name),
            "steps": 4,
            "pairs_per_batch": 2,
            "precision": "fp32",
            "layout": "joint",
            "gradient_checkpointing": False,
            "log_every": 1,
            "checkpoint_every": 1,
            "evaluate_pairs": 2,
            "threads": 1,
            "device": "cpu",
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
    }
    for section, values in sections.items():
        table[section] = {**table.get(section, {}), **values}
    return parse_config(table)


def make_pairs(folder: Path) -> None:
    """Write pairs of noisy squares; the chosen one is brighter."""
    folder.mkdir()
    draw, lines = np.random.default_rng(0), []
    for index in range(PAIRS):
        row = {"prompt": f"square {index}"}
        for half, brightness in (("chosen", 200), ("rejected", 60)):
            row[half] = f"{index:02d}-{half}.png"
            pixels = draw.integers(0, 50, (SIDE, SIDE, 3)) + brightness
            Image.fromarray(pixels.astype(np.uint8)).save(folder / row[half])
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def of_a_cache(folder: Path) -> dict[str, str]:
    """Digests of all files except the lock."""
    return {
        path.relative_to(folder).as_posix(): _digest(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def of_a_run(folder: Path) -> dict[str, str]:
    """Digests of all files except the lock and TensorBoard's, without what depends on the run's id."""
    made = of_a_cache(folder)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"]
    for name in list(made):
        path = folder / name
        if name.startswith("tensorboard/"):
            del made[name]
        elif name == "run.json":
            made[name] = "there"
        elif path.name in ("state.json", "settings.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            assert record.pop("run") == run, path
            del record["sha256"]
            made[name] = _digest(json.dumps(record, sort_keys=True).replace(str(folder), "").encode())
        elif name.endswith("/README.txt"):
            made[name] = _digest(path.read_text(encoding="utf-8").replace(str(folder), "").encode())
        elif name == "log.jsonl":
            kept = [e for e in read_log(path) if e["event"] in ("step", "evaluation")]
            for entry in kept:
                for figure in ("time", "pairs_per_s", "peak_memory_mib"):
                    entry.pop(figure, None)
            made[name] = _digest(json.dumps(kept, sort_keys=True).encode())
        elif name == "held_out_start.safetensors" or name.startswith("reference/"):
            content = path.read_bytes()
            made[name] = _digest(content[8 + int.from_bytes(content[:8], "little") :])
    return made


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def campaigns(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """One row for `prepare` and one for each kind of run."""
    shards.SHARD_BYTES, scan.PART_ROWS, reference.PART = (
        9000,
        5,
        2,
    )  # many files, so that there are many moments
    make_pairs(folder / "pairs")
    config, rows = settings(folder), []

    def preparing(cache: Path) -> None:
        data = config.data.model_copy(update={"cache": cache})
        prepare(config.model_copy(update={"data": data}))

    preparing(config.data.cache)  # here, as the first runs below: what libraries import late is there for all
    expected = of_a_cache(config.data.cache)
    rows.append(
        {"what": "prepare"}
        | campaign(preparing, of_a_cache, expected, kills, folder / "prepare", random.Random(seed))
    )
    for kind, sections in KINDS.items():
        config = settings(folder, f"expected {kind}", **sections)

        def training(output: Path, config: Config = config) -> None:
            settled = config.train.model_copy(update={"output": output})
            fit(config.model_copy(update={"train": settled}), resume=output.exists())

        training(config.train.output)
        expected = of_a_run(config.train.output)
        share = -(-kills // len(KINDS))
        rows.append(
            {"what": kind} | campaign(training, of_a_run, expected, share, folder / kind, random.Random(seed))
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--append", action="store_true", help="add the rows to the results file")
    parser.add_argument("--kills", type=int, default=KILLS, help="of prepare, and of train")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    made_on = environment()  # now: the processes that are forked run what has been imported
    with tempfile.TemporaryDirectory() as folder:
        rows = campaigns(Path(folder), args.kills, args.seed)
    for row in rows:
        print(json.dumps(row))
        if args.append:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"seed": args.seed, "environment": made_on}) + "\n")
    return 1 if any(row["differing"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
