"""Damage: to bytes, to JSON, to TOML, and to files in a folder. All of it follows from one `Random`."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

TEXTS = (
    "", " ", "x", "\0", "a\0b", "\x1b[31mred", "a\nb", "\r", "\u202e", "\ufeff", "~", "~no-such-user/x", "..",
    "../..", "/", "/dev/zero", "/etc/passwd", "x" * 300, "x" * 5000, "[bold]b[/]", "{}", "%s", "nan", "1",
    "true",
    "é", "e\u0301", "图", "🙂",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**30,
    -(10**30),
    10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e-30, 1e30, 1e300, -1e300, math.inf, -math.inf, math.nan,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, *TEXTS, *NUMBERS, [], {}, [[]], [{}], {"a": 1}, {"": None}, [1, 2], [None], ["x"],
    [1, "x"], [[[[[[]]]]]], list(range(1000)),
)  # fmt: skip
SURROGATE = "\ud800"


def of_bytes(random: Random, data: bytes) -> bytes:
    """One to four small damages."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place = random.randrange(len(found) + 1)
        length = random.choice((1, 1, 2, 4, 8, 100, 4000))
        how = random.randrange(9)
        if how == 0:
            found[place : place + length] = random.randbytes(length)
        elif how == 1:
            found[place:place] = random.randbytes(length)
        elif how == 2:
            del found[place : place + length]
        elif how == 3:
            del found[place:]
        elif how == 4:
            found[place : place + length] = bytes([random.choice((0, 255))]) * length
        elif how == 5:
            found[place:place] = found[place : place + length]
        elif how == 6 and place < len(found):
            found[place] ^= 1 << random.randrange(8)
        elif how == 7:
            found[:] = random.choice((b"", b"\0" * len(found), b"\xff\xfe" + found, b"\xef\xbb\xbf" + found))
        elif how == 8:
            number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
            found[place : place + 8] = number.to_bytes(8, "little")
    return bytes(found)


def of_value(random: Random, value: Any) -> Any:
    """Another JSON value: somewhere inside, something is replaced, removed, renamed, doubled or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return random.choice(VALUES)
        holder, key = random.choice(places)
        how = random.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[random.choice(TEXTS)] = holder.pop(key)
        elif how == 2 and isinstance(holder, dict):
            holder[random.choice(TEXTS)] = random.choice(VALUES)
        elif how == 3:
            holder[key] = random.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
        elif how == 4:
            other_holder, other = random.choice(places)
            if other_holder is holder and (isinstance(holder, dict) or other < len(holder)) and key != other:
                holder[key], holder[other] = holder[other], holder[key]
        elif how == 5 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e300:
            holder[key] = random.choice((-holder[key], holder[key] + 1, holder[key] / 3, holder[key] * 2))
        else:
            holder[key] = copy.deepcopy(random.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of everything inside."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def of_json(random: Random, text: bytes) -> bytes:
    """Damage to a JSON text: to its value, or to its bytes, or what a value cannot express."""
    how = random.randrange(8)
    if how == 0:
        return of_bytes(random, text)
    if how == 1:
        return monster(random)
    try:
        value = json.loads(text)
    except ValueError:
        return of_bytes(random, text)
    changed = json.dumps(of_value(random, value))
    if how == 2:  # a value that is no JSON, or not for every reader
        scraps = (
            "9" * 5000,
            "[" * 5000,
            "NaN",
            "-Infinity",
            "1e999",
            '"\\ud800"',
            '"\\u0000"',
            "tru",
            "01",
            "1,",
        )
        numbers = [at for at, letter in enumerate(changed) if letter == ":"]
        if numbers:
            at = random.choice(numbers) + 1
            changed = f"{changed[:at]} {random.choice(scraps)}, {changed[at:]}"
    return changed.encode("utf-8", "surrogatepass")


def monster(random: Random) -> bytes:
    """A whole file that a parser may break on."""
    return random.choice(MONSTERS)


MONSTERS = (
    b"", b"\0" * 100, b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"9" * 5000, b"null",
    b"[]", b"{}", b'"x"', b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b'{"a": 1}{"a": 2}', b"NaN",
    b'{"a": 1, "a": 2}',
)  # fmt: skip


@contextmanager
def damaged(path: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Let `make` put something else in the place of a file, which is there again afterwards."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        make(path)
        yield
    finally:
        remove(path)
        aside.rename(path)


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def special(random: Random, path: Path) -> None:
    """Something that is no regular file, or none at all."""
    how = random.randrange(10)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to("nowhere")
    elif how == 4:
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", ".", "/")))
    elif how == 5 and len(os.fsencode(path.name)) < 100:
        with socket.socket(socket.AF_UNIX) as opened:
            here = Path.cwd()
            os.chdir(path.parent)  # the name of a socket is short
            try:
                opened.bind(path.name)
            finally:
                os.chdir(here)
    elif how == 6:
        path.write_bytes(b"")
    elif how == 7:
        with path.open("wb") as file:
            file.truncate(2**27)  # sparse: takes no room on the disk
    elif how == 8:
        path.symlink_to(path.name + "/below")
    # 9: nothing
