"""Killed with SIGKILL at many moments, prepare ends with the very bytes of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mapo_fast.data.cache import PairCache
from tests.data.sources import contents, jsonl_folder

SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from mapo_fast import files
from mapo_fast.data import prepare, scan, shards
from tests.data.sources import config

model, source, cache, moments = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
shards.SHARD_BYTES = 9000  # a few items each
scan.PART_ROWS = 5
replace, count = Path.replace, 0
kill_at = 0

def killing_replace(self, target):
    # Twice per file: when it is written but not yet in place, and right after it is in place.
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    out = replace(self, target)
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return out

Path.replace = killing_replace
run = config(model, source, cache, flip=True, held_out=0.2, batch_size=3)
if moments == "none":
    prepare.prepare(run)
    print(count)
else:
    # Import once what every child needs: the children are forked.
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        kill_at += 1
        if (pid := os.fork()) == 0:
            try:
                prepare.prepare(run)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]  # the signal, or 256 × the exit code
        print(status, flush=True)
"""


def run(model: Path, source: Path, cache: Path, moments: str) -> list[int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    command = [sys.executable, "-c", SCRIPT, str(model), str(source), str(cache), moments]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")
def test_killed_at_any_moment_it_continues(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 14, prompts=12)
    (replacements,) = run(tiny_sdxl, source, tmp_path / "whole", "none")
    assert replacements > 20
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("shards/latents")]) >= 3

    # The n-th start is killed at its n-th moment, until one gets through.
    *killed, last = run(tiny_sdxl, source, tmp_path / "cut", "all")
    assert killed == [signal.SIGKILL] * len(killed)
    assert len(killed) >= 10
    assert last == 0
    assert contents(tmp_path / "cut") == expected
    PairCache.open(tmp_path / "cut")
