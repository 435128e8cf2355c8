"""The studio in a real browser: from a folder of pictures to pairs, by keyboard."""

from __future__ import annotations

import importlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mapo_fast.studio.project import Project
from mapo_fast.studio.render import Renderer
from mapo_fast.studio.server import Scan, make_app
from tests.browser import QUIET, violations
from tests.studio.pictures_of import write_picture, write_project

cli = importlib.import_module("mapo_fast.cli.studio")


@contextmanager
def served(project: Project) -> Iterator[str]:
    """The studio on a free port, its pictures read; yields its one-time address."""
    listening = cli._listen(0)
    port, scan = listening.getsockname()[1], Scan(project)
    first = scan.start()
    assert first is not None
    first.join()
    with Renderer() as renderer:
        app = make_app(project, renderer, scan, port)
        server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}/enter?token={app.once}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def browser(width: int, said: list[str]) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: make browser")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no browser: make browser")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox", *QUIET.split()])
        page = launched.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: said.append(f"request: {request.url}"))
        yield page
        launched.close()


def wait_for_votes(page: Any, count: int) -> None:
    page.wait_for_function("n => document.querySelector('#count').textContent.startsWith(n + ' ')", arg=count)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_pictures_votes_and_pairs(tmp_path: Path, width: int) -> None:
    folder, said = write_project(tmp_path / "pictures"), list[str]()
    write_picture(folder / "<img src=x>.png", (5, 5, 5))
    write_picture(folder / "zz.png", (6, 6, 6), "</script><script>alert(1)</script>")
    (folder / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with Project.open(folder) as project, served(project) as address, browser(width, said) as page:
        door = tmp_path / "open.html"
        cli._write_door(door, address)
        page.goto(door.as_uri())
        page.wait_for_url("**/")
        page.wait_for_selector("#groups h3")
        assert page.title() == "pictures – Studio"
        assert page.locator("#groups h3").count() == 4
        assert "1 have one picture only" in page.inner_text("#summary")
        assert "svg.png" in page.inner_text("#problems")
        assert violations(page) == []
        page.fill("#asked input", "prom")
        write_picture(folder / "late.png", (8, 8, 8), "prompt 1")
        page.click("#scan")
        page.focus("#asked input")
        page.wait_for_selector("#groups h3:has-text('prompt 1 (4)')")
        page.keyboard.type("pt 0")  # what was typed stays while the folder is read
        page.keyboard.press("Enter")
        page.wait_for_selector("#asked form", state="detached")
        page.wait_for_selector("#groups h3:has-text('prompt 0 (4)')")

        page.click("nav a[href='#vote']")
        wait_for_votes(page, 0)
        assert violations(page) == []
        number = 0
        while page.is_visible("#pair"):
            if number == 5:
                page.keyboard.press("Space")
                assert page.locator(".behind").count() == 1
            page.keyboard.press("ArrowDown" if number == 5 else "ArrowLeft")  # one tie
            number += 1
            wait_for_votes(page, number)
        kept = {*project.kept()}
        sizes = [group.size for group in project.groups() if group.prompt not in kept]
        assert number >= sum(size * (size - 1) // 2 for size in sizes) > 0  # every pair, and repeats
        page.keyboard.press("Backspace")
        page.wait_for_selector("#pair:not([hidden])")
        page.keyboard.press("ArrowUp")
        page.wait_for_selector("#empty:not([hidden])")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        page.click("nav a[href='#train']")
        page.click("#write")
        page.wait_for_selector("#command:not([hidden])")
        assert "mapo-fast train --preset lora" in page.inner_text("#command")
        assert violations(page) == []
        status = project.status()
    assert status.votes == number
    assert (folder / "data" / "pairs" / "pairs.jsonl").is_file()
    origin = address.split("/enter")[0]
    asked = [line for line in said if not line.startswith((f"request: {origin}/", "request: file://"))]
    assert asked == []


@pytest.mark.slow
def test_a_server_that_ends_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    folder, said = write_project(tmp_path / "pictures"), list[str]()
    with Project.open(folder) as project, browser(800, said) as page:
        with served(project) as address:
            page.goto(address)
            page.wait_for_url("**/")
            page.click("nav a[href='#vote']")
            wait_for_votes(page, 0)
            page.keyboard.press("ArrowLeft")
            wait_for_votes(page, 1)
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#said:has-text('the studio has ended')")
    with Project.open(folder) as project:
        assert project.status().votes == 1


def test_a_port_is_free_again_at_once() -> None:
    with cli._listen(0) as listening:
        port = listening.getsockname()[1]
    with cli._listen(port) as again, socket.socket() as other:
        again.listen()
        assert other.connect_ex(("127.0.0.1", port)) == 0
