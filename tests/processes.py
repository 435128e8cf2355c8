"""Several processes of one run on the CPU, forked: without the seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def together(folder: Path, call: Callable[[], Any], size: int = 2, killed: Collection[int] = ()) -> list[Any]:
    """What `call` returns in each of `size` processes, by rank; the environment is a launcher's.

    `folder` is for the answers. An exception in any of them is an error here. Those that are to be `killed`
    give no answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            answer, code = pickle.dumps(call()), 0
        except BaseException:
            answer, code = pickle.dumps(traceback.format_exc()), 1
        (folder / f"answer-{rank}").write_bytes(answer)
        os._exit(code)

    children = [multiprocessing.get_context("fork").Process(target=run, args=(r,)) for r in range(size)]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(120)
    finally:
        for child in children:
            child.kill()
    alive = [r for r in range(size) if r not in killed]
    answers = [pickle.loads((folder / f"answer-{r}").read_bytes()) for r in alive]
    failed = [answer for r, answer in zip(alive, answers, strict=True) if children[r].exitcode]
    assert not failed, "\n".join(failed)
    return answers
