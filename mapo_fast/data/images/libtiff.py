"""Collects libtiff's error messages as text; libtiff writes them to the process's standard error."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_ONE = threading.Lock()
_MESSAGE = re.compile(rb"[A-Za-z0-9_.]+: .+")
_MOST = 1 << 16


@contextmanager
def captured(said: list[str]) -> Iterator[None]:
    """Collect libtiff's messages in `said`.

    C code knows only file descriptor 2, which is the whole process': while a file is decoded it leads to a
    temporary file. What another thread writes meanwhile is written on afterwards.
    """
    with _ONE, tempfile.TemporaryFile() as file:
        try:
            kept = os.dup(2)
        except OSError:  # closed: nobody sees a message
            yield
            return
        try:
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            os.dup2(file.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read(_MOST).splitlines(keepends=True):
                if _MESSAGE.fullmatch(line.rstrip()):
                    said.append(line.decode("utf-8", "backslashreplace").strip())
                else:
                    with suppress(OSError):
                        os.write(2, line)
