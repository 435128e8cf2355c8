"""The process of a job: `python -m mapo_fast.studio.job FOLDER`.

It holds the folder's lock while it lives, runs the command in the folder's `job.json`, and writes how it
ended into `ended.json`. A file `stop` in the folder acts as Ctrl-C, so finished work is saved.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path

from mapo_fast.util.files import read_json, write_json
from mapo_fast.util.signals import STOP_FILE

JOB, PROCESS, ENDED, LOCK, LOG = "job.json", "process.json", "ended.json", ".lock", "log.txt"
_LOOK = 0.3
_PATIENCE = 20.0
_INSIDE = {"looks": "mapo_fast.studio.looks"}
"""Commands of the studio itself."""


def main() -> None:
    """Run one job."""
    from filelock import FileLock

    folder = Path(sys.argv[1])
    # A studio started in the background of a script ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with FileLock(folder / LOCK, timeout=_PATIENCE):
        write_json(folder / PROCESS, {"pid": os.getpid(), "started": time.time()})
        threading.Thread(target=_watch, args=(folder / STOP_FILE,), daemon=True).start()
        code = _run(read_json(folder / JOB)["argv"])
        write_json(folder / ENDED, {"code": code, "time": time.time()})
    # Threads of libraries must not keep a job alive that has ended.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(argv: list[str]) -> int:
    """The command's exit code."""
    try:
        if argv[0] in _INSIDE:
            import_module(_INSIDE[argv[0]]).main(argv[1:])
        else:
            sys.argv = ["mapo-fast", *argv]
            runpy.run_module("mapo_fast", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _watch(path: Path) -> None:
    """Interrupt the main thread when the file is there."""
    while not path.exists():
        time.sleep(_LOOK)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
