"""Files of JSON lines that only grow: a line is on the disk before `append` returns.

A line that a kill cut short is moved to a file beside it. A write that fails leaves the file as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, fsync, os_error, parse_json, read_bytes

LARGEST = 1 << 28
"""Largest file that is read, in bytes."""


class Records:
    """The objects of a file, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[int] = []
        """Numbers of lines that are no JSON objects; they stay in the file and do not count."""
        self.lines: list[dict[str, Any]] = []
        self._length = 0
        data = self._read()
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                value = parse_json(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                self.lines.append(value)
            else:
                self.damaged.append(number)

    def _read(self) -> bytes:
        """The whole lines; the rest of a line that was cut short is set aside."""
        try:
            data = read_bytes(self.path, LARGEST)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise os_error(error, f"read {self.path}") from None
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            torn = self.path.with_name(f"{self.path.name}.torn")
            with disk_errors(torn):
                with torn.open("ab") as file:
                    file.write(data[whole:] + b"\n")
                fsync(torn)
                os.truncate(self.path, whole)
        self._length = whole
        return data[:whole]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line and flush it to the disk.

        Raises:
            UserError: the disk is full or read-only, or the file was changed by another program.
        """
        line = json.dumps(dict(record), ensure_ascii=True).encode() + b"\n"
        new = self._length == 0
        with disk_errors(self.path):
            handle = os.open(
                self.path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if new else 0) | getattr(os, "O_BINARY", 0)
            )
            try:
                if os.fstat(handle).st_size != self._length:
                    raise UserError(f"{self.path} was changed by another program: open the project again")
                self._put(handle, line)
            finally:
                os.close(handle)
            if new:
                fsync(self.path.parent)
        self._length += len(line)
        self.lines.append(dict(record))

    def _put(self, handle: int, line: bytes) -> None:
        try:
            at = 0
            while at < len(line):
                at += os.write(handle, line[at:])
            os.fsync(handle)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell; a torn line is set aside later
                os.ftruncate(handle, self._length)
            raise
