"""Pages in a real browser: Debian's Chromium, headless. `make browser` brings it; tests skip without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
)
"""Chromium asks its maker's hosts for this and that otherwise."""


def violations(page: Any) -> list[str]:
    """What axe-core finds on a page, in light and in dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core: make browser")
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for one in axe.Axe().run(page).response["violations"]:
            found += [f"{scheme}: {one['id']}: {node['html'][:200]}" for node in one["nodes"]]
    return found


@contextmanager
def opened(path: Path, width: int) -> Iterator[Any]:
    """A page with a file in it, `width` pixels wide.

    Fails where it asks for anything, and where it or axe-core complains.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: make browser")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no browser: make browser")
    said: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-sync", *QUIET.split()]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: said.append(f"request: {request.url[:100]}"))
        page.goto(path.as_uri())
        yield page
        found = violations(page)
        browser.close()
    assert not found, "\n".join(found)
    asked = [line for line in said if not line.startswith(("request: file://", "request: data:"))]
    assert asked == []
    assert said.count(f"request: {path.as_uri()[:100]}") == 1
