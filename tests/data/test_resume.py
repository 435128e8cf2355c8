"""Killed with SIGKILL at many moments, prepare ends with the very bytes of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mapo_fast.data import scan, shards
from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from tests.data.pair_sources import config, contents, jsonl_folder

SHARD_BYTES = 9000  # a few items each
PART_ROWS = 5
SETTINGS = {"flip": True, "held_out": 0.2, "batch_size": 3}

SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from diffusers import AutoencoderKL  # imported once for all children: they are forked
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from mapo_fast.data import prepare, scan, shards
from tests.data import test_resume
from tests.data.pair_sources import config

run = config(*map(Path, sys.argv[1:4]), **test_resume.SETTINGS)
shards.SHARD_BYTES, scan.PART_ROWS = test_resume.SHARD_BYTES, test_resume.PART_ROWS
replace, count, kill_at, status = Path.replace, 0, 0, signal.SIGKILL

def passing_a_moment():
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def killing_replace(self, target):
    passing_a_moment()  # the file is written but not yet in place
    out = replace(self, target)
    passing_a_moment()  # it has just come into place
    return out

Path.replace = killing_replace
while status == signal.SIGKILL:
    kill_at += 1 if kill_at < 4 else 3  # odd and even: before and after a file comes into place
    if (pid := os.fork()) == 0:
        try:
            prepare.prepare(run)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]  # the signal, or 256 × the exit code
    print(status, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")
def test_killed_at_any_moment_it_continues(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 14, prompts=12)
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(scan, "PART_ROWS", PART_ROWS)
    prepare(config(tiny_sdxl, source, tmp_path / "whole", **SETTINGS))
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("shards/latents")]) >= 3

    # The n-th start is killed at its n-th moment, until one gets through.
    command = [sys.executable, "-c", SCRIPT, tiny_sdxl, source, tmp_path / "cut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    *killed, last = map(int, done.stdout.split())
    assert last == 0, done.stderr
    assert killed == [signal.SIGKILL] * len(killed)
    assert len(killed) >= 8
    assert contents(tmp_path / "cut") == expected
    PairCache.open(tmp_path / "cut")
