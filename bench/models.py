"""Models of real size without their weights: `python -m bench.models`, about five minutes and 20 GB of disk.

The files have the full-size SDXL's keys, shapes and types and are holes: they take no space, and reading them
costs what reading zeros costs. One row goes to `bench/results/models.jsonl`:

recognise   bytes read of a 6.5 GB file to recognise it, and to plan for it
load        CPU seconds of loading the UNet out of the file, and of diffusers' loading it from a folder:
            medians of five in one process, after one that does not count. In fp16, the files' type, and in
            bf16
memory      the most anonymous memory on top of what was there before: of loading the UNet in bf16, and of
            writing the whole model as a file
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench.environment import environment
from bench.hollow import hollow, sdxl_keys
from mapo_fast.models import single_file
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.save import save_single_file
from mapo_fast.planner.models import parts_of
from mapo_fast.settings.load import parse_config
from mapo_fast.util.tensorheader import BITS

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
REPEATS = 5


def main() -> int:
    if len(sys.argv) > 1:
        return _alone(sys.argv[1], Path(sys.argv[2]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        file = hollow(folder / "sdxl.safetensors", sdxl_keys())
        row = {
            "bench": "models",
            "file_bytes": file.stat().st_size,
            "recognise_bytes": _bytes_read(lambda: open_sdxl(file)),
            "plan_bytes": _bytes_read(lambda: _plan(file)),
            **_load_times(file, _unet_folder(folder / "unet")),
            **{f"{what}_peak_bytes": _in_a_process(what, file) for what in ("load", "export")},
            "unet_bytes": 2 * _parameters(file),
            "environment": environment(),
        }
    print(json.dumps(row, indent=1))
    with RESULTS.open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
    good = (
        row["recognise_bytes"] < 2**20
        and all(row[f"load_{t}_cpu_s"] <= 1.2 * row[f"diffusers_{t}_cpu_s"] for t in ("fp16", "bf16"))
        and row["load_peak_bytes"] <= row["unet_bytes"] + 2**30
        and row["export_peak_bytes"] < 1.5e9
    )
    print("within the limits" if good else "NOT within the limits")
    return 0 if good else 1


def _plan(file: Path) -> None:
    table = {"model": {"path": str(file)}, "data": {"cache": "c"}, "train": {"output": "o", "steps": 1}}
    parts_of(str(file), parse_config(table))


def _bytes_read(call: Callable[[], Any]) -> int:
    """Bytes that this process has read from files of any kind."""
    call()  # modules are imported

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    overhead = -read() + read()
    before = read()
    call()
    return read() - before - overhead


def _unet_folder(folder: Path) -> Path:
    """A hollow UNet as diffusers saves it, in fp16."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(SDXL_UNET)
    unet.save_config(folder)
    keys = {name: ("F16", tuple(tensor.shape)) for name, tensor in unet.state_dict().items()}
    hollow(folder / "diffusion_pytorch_model.safetensors", keys)
    return folder


def _load_times(file: Path, folder: Path) -> dict[str, float]:
    model = open_sdxl(file)
    found = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        ways: dict[str, Callable[[], Any]] = {
            "load": lambda dtype=dtype: model.load_unet(dtype),
            "diffusers": lambda dtype=dtype: UNet2DConditionModel.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True
            ),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(REPEATS + 1):
            for way, load in ways.items():
                began = time.process_time()
                load()
                if repeat:
                    times[way].append(time.process_time() - began)
        found |= {f"{way}_{name}_cpu_s": round(statistics.median(t), 2) for way, t in times.items()}
    return found


def _parameters(file: Path) -> int:
    stored = open_sdxl(file).parts["unet"].stored.values()
    return sum(8 * (s.end - s.begin) // BITS[s.dtype] for s in stored)


def _in_a_process(what: str, file: Path) -> int:
    command = [sys.executable, "-m", "bench.models", what, str(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _alone(what: str, file: Path) -> int:
    torch.set_num_threads(1)
    model = open_sdxl(file)
    single_file.metadata(model)  # imports what both need
    out = file.with_name("written.safetensors")
    with _watched() as peak:
        if what == "load":
            _ = model.load_unet(torch.bfloat16)
        else:
            save_single_file(model, out)
    out.unlink(missing_ok=True)
    print(peak[0])
    return 0


@contextmanager
def _watched() -> Any:
    """Peak anonymous memory within the context, on top of that before it; sampled 200 times a second."""

    def anonymous() -> int:
        line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], anonymous() - before)
        done.set()
        thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
