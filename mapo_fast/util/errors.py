"""The errors that become one line: what is wrong, where, and how to fix it."""

import builtins
import re
import reprlib

_LONGEST = 2000


class UserError(Exception):
    """A mistake in a config, a file or a combination of settings.

    The command line prints the message without a stack trace and exits with `exit_code`. The text is one
    printable line, whatever names and values are in it; the middle of a very long one is left out.
    """

    exit_code = 2
    reported = False
    """Whether another process prints it."""

    def __str__(self) -> str:
        """The message, `printable`."""
        text = printable(super().__str__())
        if len(text) > _LONGEST:  # most likely a long value; the remedy is at the end
            text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 4 :]}"
        return text


class MachineError(UserError):
    """The machine failed, not the input: a full disk, an I/O error, too many open files."""

    exit_code = 1


class FailedRunError(UserError):
    """Training failed: the model diverged, or too many steps were skipped."""

    exit_code = 1


def printable(text: str) -> str:
    """The text on one line, without characters that a terminal would act on.

    Names of files, columns and splits come from outside: line breaks, escape sequences, direction marks and
    lone surrogates in them are written as Python escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 4

    def repr_bytes(self, value: bytes, level: int) -> str:
        return builtins.repr(value[:20]) + ("..." if len(value) > 20 else "")


_SHORT = _Short()
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def shown(value: object) -> str:
    """A value for a message: Python's notation, the same in every run, without the middle of a long value."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a number of type {type(value).__name__}"
    return printable(_ADDRESS.sub("", text))
