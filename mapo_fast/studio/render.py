"""Pictures for the browser: decoded and written again by another process, never served as they are.

A picture from elsewhere may be made to crash a decoder, or to fill memory. The process that decodes has
limits on its memory, is ended when one picture takes too long, and is started again for the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from mapo_fast.studio.jobs import environment
from mapo_fast.studio.renderer import FORMATS
from mapo_fast.util.errors import UserError, shown

SECONDS = 20.0
"""Longest time for one picture."""
_LARGEST_SIDE = 8192


class Renderer:
    """Renders one picture at a time; a context manager, or `close` it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, file: Path, width: int, format: str = "WEBP") -> bytes:
        """A picture at most `width` wide and high, upright, as PNG, JPEG or WebP without metadata.

        Raises:
            UserError: it cannot be shown; the text says why.
        """
        if format not in FORMATS or not 1 <= width <= _LARGEST_SIDE:
            raise UserError(
                f"{shown(format)} {shown(width)}: must be one of {', '.join(FORMATS)}, and a width"
            )
        task = json.dumps({"path": os.fspath(file), "width": width, "format": format}).encode() + b"\n"
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(self._seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(task)
                process.stdin.flush()
                size = int.from_bytes(_exactly(process.stdout, 8), "big", signed=True)
                data = _exactly(process.stdout, abs(size))
            except OSError:
                self._end()
                raise UserError(
                    f"{file.name} cannot be shown: decoding it took too long or too much memory"
                ) from None
            finally:
                timer.cancel()
        if size < 0:
            raise UserError(f"{file.name} cannot be shown: {data.decode('utf-8', 'replace')}")
        return data

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mapo_fast.studio.renderer"],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:  # what was not written has no reader any more
                    pass

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def __enter__(self) -> Renderer:
        """Use as a context manager."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise BrokenPipeError
    return data
