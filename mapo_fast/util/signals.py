"""Signals that stop a command: Ctrl-C, SIGTERM, a terminal that closes.

Training takes the first one as a request: it finishes the step, saves and ends. The second ends it at once.
Commands with nothing to finish end at the first signal, by an exception, so that temporary files are removed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

CAUGHT = tuple(
    signal.Signals(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last but one not on Windows, the last only
    if hasattr(signal, name)
)


class Interrupted(KeyboardInterrupt):
    """A signal ends the command at once; the text is for the user."""

    def __init__(self, number: int, text: str = "interrupted") -> None:
        super().__init__(text)
        self.number = number


class StopNow(Exception):  # noqa: N818 - it is a request
    """A signal asks for the end, and the work under way can be abandoned."""


def exit_code(number: int | None) -> int:
    """128 + the signal's number, as shells say it; a plain `KeyboardInterrupt` is SIGINT."""
    return 128 + (number or signal.SIGINT)


STOP_FILE = "stop"
"""A file of this name in the folder of a run or of samples stops what works there, as Ctrl-C does."""


def stop_file(folder: Path) -> bool:
    """Whether a stop file is there; it is removed."""
    path = folder / STOP_FILE
    if not path.exists():
        return False
    path.unlink(missing_ok=True)
    return True


class StopRequest:
    """Context manager; `requested` turns true at the first signal, a second one raises `Interrupted`.

    With a folder it turns true at a stop file in it too. Outside the main thread signals cannot be caught,
    and only the file stops.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._requested = False
        self.number = 0
        """Number of the first signal; 0 before one."""
        self._handling = _handling(self._handle)

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        if not self._requested and self._folder is not None:
            self._requested = stop_file(self._folder)
        return self._requested

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        self._handling.__exit__(None, None, None)

    def poll(self) -> None:
        """Raise `StopNow` after a signal; for a process that need not agree with others."""
        if self.requested:
            raise StopNow

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise Interrupted(number)
        self._requested, self.number = True, number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let every stop signal raise `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(interrupt):
        yield


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in CAUGHT:
                # `nohup` has it ignored: the run is to outlive its terminal.
                if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
