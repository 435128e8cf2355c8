"""The studio with many pictures and votes: headers per CPU second, memory, and the next pair.

    python -m bench.studio [--append] [--pictures N] [--votes N]

Pictures are PNG files of about 20 kB with A1111's text, four of each prompt. Memory is this process's, when
the first 2,000 and when all pictures are listed. The next pair is asked for, and voted on, with all votes
there; times are CPU times of both together. With --append the row goes to bench/results/studio.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from bench.environment import environment
from mapo_fast.studio.project import Project

RESULTS = Path(__file__).parent / "results" / "studio.jsonl"
EACH = 4
"""Pictures of a prompt."""
_ASKED = 300


def measure(folder: Path, pictures: int, votes: int) -> dict[str, Any]:
    """Make pictures and votes in an empty folder, and measure."""
    rng = random.Random(0)
    for number in range(pictures):
        prompt = f"prompt {number // EACH}, a photograph of a cat in the snow, high detail"
        (folder / f"{number:06d}.png").write_bytes(_png(prompt, number, rng))
    memory: list[int] = []
    with Project.open(folder) as project:
        began, first = time.process_time(), None
        for progress in project.scan():
            if first is None:
                first = time.process_time() - began
            if progress.seen >= 2000 and not memory:
                memory.append(_resident())
        seconds = time.process_time() - began
        memory.append(_resident())
        ids = project.pictures(limit=pictures)
    _vote(folder, [picture.path for picture in ids], votes, rng)
    with Project.open(folder) as project:
        project.next_pairs("tab")
        times = []
        for _ in range(_ASKED):
            began = time.process_time()
            (pair, *_) = project.next_pairs("tab")
            project.vote(pair.id, "left", 1.0)
            times.append(1000 * (time.process_time() - began))
    times.sort()
    return {
        "what": "pictures and votes",
        "pictures": pictures,
        "votes": votes,
        "headers_per_cpu_s": round(pictures / seconds),
        "first_page_cpu_s": round(first or seconds, 3),
        "memory_mib": [round(size / 2**20, 1) for size in memory],
        "next_pair_ms": {
            "p50": round(times[len(times) // 2], 2),
            "p95": round(times[len(times) * 95 // 100], 2),
        },
    }


def _png(prompt: str, seed: int, rng: random.Random) -> bytes:
    """A picture that says how it was made; its pixels are never read here."""
    how = f"Steps: 25, Sampler: Euler a, CFG scale: 7, Seed: {seed}, Size: 832x1216"
    said = f"{prompt}\nNegative prompt: blurry\n{how}"
    head = struct.pack(">IIBBBBB", 832, 1216, 8, 2, 0, 0, 0)
    body = rng.randbytes(20_000 + rng.randrange(8000))
    parts = [(b"IHDR", head), (b"tEXt", b"parameters\0" + said.encode()), (b"IDAT", body), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _vote(folder: Path, paths: list[str], votes: int, rng: random.Random) -> None:
    """Write votes as the studio does, without a flush for each."""
    pairs = [
        (at + one, at + other)
        for at in range(0, len(paths), EACH)
        for one in range(EACH)
        for other in range(one + 1, EACH)
    ]
    with (folder / "votes.jsonl").open("w", encoding="utf-8") as file:
        for left, right in rng.sample(pairs[len(pairs) // 10 :], votes):
            vote = {
                "pair": f"{left}-{right}",
                "prompt": f"prompt {left // EACH}, a photograph of a cat in the snow, high detail",
                "left": paths[left],
                "right": paths[right],
                "left_sha256": f"{left:064x}",
                "right_sha256": f"{right:064x}",
                "mirrored": False,
                "answer": rng.choice(("left", "right", "tie")),
                "seconds": 1.0,
                "time": 0.0,
            }
            file.write(json.dumps(vote) + "\n")


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--votes", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        project = Path(folder) / "project"
        project.mkdir()
        row = measure(project, given.pictures, given.votes) | {"environment": environment()}
    print(json.dumps(row))
    if given.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
