"""Code that a page of the documentation shows, imported as a user's module outside the package."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXTEND = Path(__file__).parent.parent / "docs" / "extend"


@contextmanager
def imported(page: str, folder: Path) -> Iterator[ModuleType]:
    """The module that `docs/extend/PAGE.md` shows, written into a folder; forgotten at the end."""
    text = (EXTEND / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(\"\"\".*?)```", text, re.DOTALL)
    name = f"{page}_of_the_page"
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)
