"""The studio's server: pages from `static/`, and what they ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mapo_fast.studio.answers import Answer
from mapo_fast.studio.project import Project
from mapo_fast.studio.render import Renderer
from mapo_fast.studio.security import Guard
from mapo_fast.util.console import command_line
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import parse_json

WIDTHS = (256, 1024, 2048)
_STATIC = Path(__file__).with_name("static")
_FILES = {"/": "index.html", "/studio.css": "studio.css", "/studio.js": "studio.js"}
_LISTED = 200
"""Most rows of a list on a page."""
_ROW = 12
"""Most thumbnails of a prompt."""


class Scan:
    """Reads the pictures of a project in a thread, with the pages there meanwhile."""

    def __init__(self, project: Project) -> None:
        self._project, self._lock = project, threading.Lock()
        self.seen: int | None = None
        """Files that a scan under way has seen; None where none is under way."""
        self.trouble = ""
        """Why the newest scan failed; empty where it did not."""
        self._ending = False

    def start(self) -> threading.Thread | None:
        """Begin; None where a scan is under way already."""
        with self._lock:
            if self.seen is not None:
                return None
            self.seen, self.trouble = 0, ""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def end(self) -> None:
        """Ask a scan under way to end."""
        self._ending = True

    def _run(self) -> None:
        try:
            for progress in self._project.scan(lambda: self._ending):
                self.seen = progress.seen
        except (UserError, OSError) as error:
            self.trouble = str(error)
        finally:
            self.seen = None


def make_app(
    project: Project, renderer: Renderer, scan: Scan, port: int, hosts: tuple[str, ...] = ()
) -> Guard:
    """The application behind its guard.

    Args:
        project: an open project.
        renderer: makes the pictures.
        scan: reads the project's pictures.
        port: of the server.
        hosts: see `Guard`.
    """
    guard: Guard

    def answer(call: Callable[[Mapping[str, Any]], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            given: Any = dict(request.query_params)
            if request.method == "POST":
                try:
                    given = parse_json(await request.body())
                except ValueError:
                    given = None
                if not isinstance(given, dict):
                    return JSONResponse({"error": "the request is no JSON object"}, 400)
            try:
                return JSONResponse(await run_in_threadpool(call, given))
            except UserError as error:
                return JSONResponse({"error": str(error)}, 409)

        return handle

    def state(_: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": guard.token, **_state(project, scan)}

    def pair(given: Mapping[str, Any]) -> dict[str, Any]:
        pairs = project.next_pairs(_tab(given))
        found = [
            {name: getattr(one, name) for name in ("id", "prompt", "left", "right")} for one in pairs[:1]
        ]
        later = [picture for one in pairs[1:] for picture in (one.left, one.right)]
        return {"pair": found[0] if found else None, "ahead": later, **_state(project, scan)}

    def vote(given: Mapping[str, Any]) -> dict[str, Any]:
        said, one, seconds = given.get("answer"), given.get("pair"), given.get("seconds", 0)
        if said not in get_args(Answer) or not isinstance(one, str) or type(seconds) not in (int, float):
            raise UserError(f"a vote has a pair and an answer: {', '.join(get_args(Answer))}")
        project.vote(one, cast("Answer", said), seconds)
        return pair(given)

    def undo(given: Mapping[str, Any]) -> dict[str, Any]:
        project.undo(_tab(given))
        return pair(given)

    def prompt(given: Mapping[str, Any]) -> dict[str, Any]:
        ids, text = given.get("ids"), given.get("prompt")
        if not isinstance(ids, list) or not all(type(one) is int for one in ids) or not isinstance(text, str):
            raise UserError("a prompt is a text for some pictures")
        project.set_prompt(ids, text)
        return _pictures(project, scan)

    def again(_: Mapping[str, Any]) -> dict[str, Any]:
        scan.start()
        return _pictures(project, scan)

    def pairs(_: Mapping[str, Any]) -> dict[str, Any]:
        folder, count = project.write_data()
        words = ["mapo-fast", "train", "--preset", "lora", "--model", "MODEL.safetensors", "--data"]
        command = command_line([*words, str(folder)])
        return {"pairs": count, "command": command, "warnings": project.data_card()}

    async def picture(request: Request) -> Response:
        width = request.query_params.get("width", "1024")
        file = await run_in_threadpool(project.picture_file, request.path_params["id"])
        if file is None or not width.isdecimal() or int(width) not in WIDTHS:
            raise HTTPException(404)
        try:
            data = await run_in_threadpool(renderer.render, file, int(width))
        except UserError as error:
            return PlainTextResponse(str(error), 422)
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})

    async def static(request: Request) -> Response:
        return FileResponse(_STATIC / _FILES[request.url.path])

    async def nothing(_: Request) -> Response:
        return Response(status_code=204)

    routes = [Route(path, static) for path in _FILES]
    routes += [
        Route("/favicon.ico", nothing),
        Route("/api/state", answer(state)),
        Route("/api/pair", answer(pair)),
        Route("/api/pictures", answer(lambda _: _pictures(project, scan))),
        Route("/api/vote", answer(vote), methods=["POST"]),
        Route("/api/undo", answer(undo), methods=["POST"]),
        Route("/api/prompt", answer(prompt), methods=["POST"]),
        Route("/api/scan", answer(again), methods=["POST"]),
        Route("/api/pairs", answer(pairs), methods=["POST"]),
        Route("/picture/{id:int}", picture),
    ]
    guard = Guard(Starlette(routes=routes), port, hosts)
    return guard


def _tab(given: Mapping[str, Any]) -> str:
    """The name that a tab has given itself; each tab has a pair of its own."""
    tab = given.get("tab")
    if not isinstance(tab, str) or not 0 < len(tab) <= 64:
        raise UserError("a tab has a name of at most 64 characters")
    return tab


def _state(project: Project, scan: Scan) -> dict[str, Any]:
    return {
        "name": project.folder.name,
        "network": project.network_drive or "",
        "seen": scan.seen,
        "trouble": scan.trouble,
        **project.status()._asdict(),
    }


def _pictures(project: Project, scan: Scan) -> dict[str, Any]:
    groups = project.groups()[:_LISTED]
    return {
        **_state(project, scan),
        "groups": [
            {
                "prompt": group.prompt,
                "size": group.size,
                "ids": [one.id for one in project.pictures(group.id, limit=_ROW)],
            }
            for group in groups
        ],
        "asked": [{"id": p.id, "file": p.path, "why": p.why} for p in project.unknown(limit=_LISTED)],
        "unusable": [{"file": p.path, "why": p.broken} for p in project.broken(limit=_LISTED)],
    }
