"""Code from outside this package that adds objectives, optimizers and data sources.

It comes from two places, under the control of the person who installs packages and types commands:

- an installed package, by an entry point in the group `mapo_fast.extensions`;
- `--allow-code module:function` on the command line.

Either one names a function without arguments, which is called once in a process and registers its additions.
Modules are found where Python finds installed ones, `PYTHONPATH` included, and never in the current folder or
the config's. Configs, models, data and run folders name no code: `docs/security.md`.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "mapo_fast.extensions"
_CODE = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")

_allowed: set[str] = set()
_problems: tuple[str, ...] | None = None


def allow(code: str, say: Callable[[str], None], config: Path | None = None) -> None:
    """Import and call the function that `--allow-code` names, unless this process has done so before.

    Args:
        code: `module:function`.
        say: called with a line that names the file before it is imported.
        config: the config file; no code is taken from its folder.

    Raises:
        UserError: the name is not `module:function`, the module is not installed, it lies in the current
            folder or the config's, or the function fails.
    """
    if (written := _CODE.fullmatch(code)) is None:
        raise UserError(f"--allow-code {code!r}: write it as module:function, such as my_package:register")
    if code in _allowed:
        return
    untrusted = {Path.cwd().resolve()}
    if config is not None:  # a link's folder, and that of the file itself
        untrusted |= {config.parent.resolve(), config.resolve().parent}
    with _without(untrusted):
        files = _files(written["module"])
        if not files:
            raise UserError(
                f"--allow-code {code}: no module {written['module']} is installed; it is looked for among "
                "installed packages and in PYTHONPATH, never in the current folder or the config's"
            )
        for file in files:
            if folder := _lies_in(file, untrusted):
                raise UserError(
                    f"--allow-code {code}: {file} lies in {folder}, the current folder or the config's, "
                    "which no code is taken from: install it, or start elsewhere"
                )
        say(f"--allow-code {code}: importing {files[-1]}")
        try:
            getattr(import_module(written["module"]), written["function"])()
        except (Exception, SystemExit) as error:
            raise UserError(f"--allow-code {code} failed: {_said(error)}") from error
    _allowed.add(code)


def load_installed() -> tuple[str, ...]:
    """Call the entry points of installed packages, once in a process; returns one line for each failure.

    The registries call this where a name is unknown. So commands that use no additions import no packages,
    and a broken package breaks nothing else.
    """
    global _problems
    if _problems is None:
        _problems = ()  # also for what the entry points ask for themselves
        with _without({Path.cwd().resolve()}):
            _problems = tuple(filter(None, map(_call, _entry_points())))
    return _problems


def _entry_points() -> list[EntryPoint]:
    """The group's entry points; where several packages on the path have one name, those of the first."""
    from importlib import metadata  # slow, and asked for names only that are not built in

    packages: dict[str, metadata.Distribution] = {}
    for package in metadata.distributions(path=sys.path):
        packages.setdefault(package.name, package)
    return [e for package in packages.values() for e in package.entry_points if e.group == GROUP]


def _call(entry: EntryPoint) -> str:
    try:
        entry.load()()
    except (Exception, SystemExit) as error:
        package = entry.dist.name if entry.dist is not None else "an installed package"
        return f"{entry.name} of {package} ({entry.value}) failed: {_said(error)}"
    return ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def _without(folders: Iterable[Path]) -> Iterator[None]:
    """Keep Python from looking for modules in these folders while the context is open."""
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() not in folders]
    try:
        yield
    finally:
        sys.path[:] = before


def _files(module: str) -> list[Path]:
    """Files of a module and of the packages that it lies in, outermost first, before any of them is imported.

    For a package without `__init__.py`, its folders. Empty where the module is missing or not a file.
    """
    files: list[Path] = []
    names, search = module.split("."), None
    for i in range(len(names)):
        name = ".".join(names[: i + 1])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next((s for find in finders if find is not None and (s := find(name, search))), None)
        if spec is None or not (spec.has_location or spec.submodule_search_locations):
            return []
        found = [spec.origin] if spec.has_location else spec.submodule_search_locations
        files += [Path(file).resolve() for file in found or () if file is not None]
        search = spec.submodule_search_locations
        if search is None and i + 1 < len(names):
            return []
    return files


def _lies_in(file: Path, folders: Iterable[Path]) -> Path | None:
    """The folder of these that contains a file; None for installed modules, which may lie anywhere."""
    purelib, platlib, stdlib = map(sysconfig.get_path, ("purelib", "platlib", "stdlib"))
    installed = (purelib, platlib, stdlib, site.getusersitepackages(), *site.getsitepackages())
    if any(file.is_relative_to(Path(folder).resolve()) for folder in installed):
        return None
    return next((folder for folder in folders if file.is_relative_to(folder)), None)
