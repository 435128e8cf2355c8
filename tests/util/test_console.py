"""What reaches the terminal is text: no escape sequences, line breaks or markup from names."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.progress import Progress

from mapo_fast import cli
from mapo_fast.data.prepare import prepare
from mapo_fast.run.log import RunLog
from mapo_fast.util.console import Terminal, encode_anything, say, unfailing
from mapo_fast.util.errors import UserError, printable
from tests.data.pair_sources import config, png

HOSTILE = "\x1b[2J\x1b]0;pwned\x07 [bold red]x[/] [link=a]\nmapo-fast: all is well\r\x9b31m\u202e\u2028\ud800"


def test_hostile_text_is_one_printable_line() -> None:
    line = printable(HOSTILE)
    assert line.isprintable()
    assert line.startswith(r"\x1b[2J\x1b]0;pwned\x07 [bold red]x[/]")
    assert printable("größe 図 🙂 a\\b") == "größe 図 🙂 a\\b"


def test_an_error_is_one_line_of_bounded_length() -> None:
    line = str(UserError(f"{HOSTILE} is wrong"))
    assert line == f"{printable(HOSTILE)} is wrong"
    long = str(UserError(f"a = {'x' * 10**6}: use b"))
    assert long.startswith("a = xxx")
    assert long.endswith("xxx: use b")
    assert len(long) < 2000
    assert len(str(UserError("\udcff" * 10**5))) < 2000


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_said_is_not_acted_on(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=400)
    say(console, HOSTILE)
    assert console.file.getvalue() == printable(HOSTILE) + "\n"  # type: ignore[attr-defined]


def test_a_warning_of_a_run_is_printed_as_it_is(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=400)
    with RunLog(tmp_path / "run", 2, Terminal(console)) as log:
        log.warning(0, HOSTILE)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == f"warning at step 0: {printable(HOSTILE)}\n"


def test_names_of_splits_are_said_on_one_line(tmp_path: Path, tiny_sdxl: Path) -> None:
    rows = [{"prompt": "a red thing", "chosen": png(0), "rejected": png(1)}]
    for name in ("train-00000-of-00001", "\x1b[31mx[red]y-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    prepare(config(tiny_sdxl, tmp_path, tmp_path.parent / "cache"), callbacks=Terminal(console))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"has the splits \x1b[31mx[red]y, train; train is used" in said


def test_a_character_that_the_output_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    encode_anything()
    print("图/run")
    output.flush()
    assert output.buffer.getvalue().rstrip() == rb"\u56fe/run"  # type: ignore[attr-defined]


class Failing(io.StringIO):
    """A stream that takes nothing, or ASCII only."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if isinstance(self.error, UnicodeEncodeError) and text.isascii():
            return super().write(text)
        raise self.error

    def flush(self) -> None:
        if not isinstance(self.error, UnicodeEncodeError):
            raise self.error


FULL = Path("/dev/full")

FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),  # `| tee` that has ended
    OSError(errno.EIO, "Input/output error"),  # a terminal that was closed
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_that_fails_is_no_error(error: Exception, terminal: bool) -> None:
    file = Failing(error)
    console = Console(file=file, force_terminal=terminal, width=80, legacy_windows=False)
    say(unfailing(console), "a line")
    console.rule("a stage")
    with Progress(console=console) as progress:
        progress.update(progress.add_task("x", total=2), advance=1)
    assert file.getvalue() == ""


def test_what_a_console_cannot_encode_is_escaped() -> None:
    console = Console(file=Failing(UnicodeEncodeError("ascii", "ü", 0, 1, "not in range")), width=80)
    say(unfailing(console), "größe")
    assert console.file.getvalue() == "gr\\xf6\\xdfe\n"  # type: ignore[attr-defined]


def test_prepare_goes_on_without_its_console(tmp_path: Path, tiny_sdxl: Path) -> None:
    images = [png(i) for i in range(6)]
    rows = [{"prompt": f"red {i}", "chosen": images[2 * i], "rejected": images[2 * i + 1]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    cache = tmp_path.parent / "unheard"
    console = Console(file=Failing(FAILURES[1]), force_terminal=True, width=80, legacy_windows=False)
    assert prepare(config(tiny_sdxl, tmp_path, cache), callbacks=Terminal(console)).pairs == 3


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_process_whose_output_may_fail_ends_well_on_a_full_disk() -> None:
    """Python's own last flush would make the exit code 120."""
    code = (
        "from mapo_fast.util.console import output_may_fail\n"
        "output_may_fail(); print('x' * 9000); print('end')"
    )
    with FULL.open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "a/\x1b[31mb"), 1, r"a/\x1b[31mb"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), 2, "(x)"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you ask"), 1, "you ask"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("mapo_fast.settings.load.load_config", fail)
    monkeypatch.setattr(sys, "argv", ["mapo-fast", "prepare", "c.toml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    out = capsys.readouterr().err
    assert said in out
    assert out.count("\n") == 1


def test_a_mistake_in_the_program_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mapo_fast.settings.load.load_config", fail)
    monkeypatch.setattr(sys, "argv", ["mapo-fast", "prepare", "c.toml"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()
