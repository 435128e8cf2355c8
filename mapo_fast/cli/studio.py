"""`mapo-fast studio`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mapo_fast.util.console import Terminal, output_may_fail
from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    import socket


def studio(
    folder: Annotated[
        Path, typer.Argument(help="Folder with your pictures; votes and pairs are kept in it.")
    ],
    port: Annotated[int, typer.Option("--port", help="Port of the server; 0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="HOST:PORT that a tunnel's other end has. May be repeated."),
    ] = None,
) -> None:
    """Vote on pictures in the browser, and write the pairs to train on. For one person on this machine."""
    import webbrowser

    try:
        import uvicorn

        from mapo_fast.studio.server import Scan, make_app
    except ImportError as missing:
        raise UserError(f"{missing.name} is not installed: pip install 'mapo_fast[studio]'") from None
    from mapo_fast.studio.index import cache_folder
    from mapo_fast.studio.project import Project
    from mapo_fast.studio.render import Renderer

    output_may_fail()
    callbacks = Terminal()
    listening = _listen(port)
    port = listening.getsockname()[1]
    with listening, Project.open(folder) as project, Renderer() as renderer:
        scan = Scan(project)
        app = make_app(project, renderer, scan, port, tuple(allow_host or ()))
        address = f"http://127.0.0.1:{port}/enter?token={app.once}"
        door = cache_folder() / f"open-{port}.html"
        _write_door(door, address)
        scan.start()
        callbacks.message(f"the studio of {folder} is open; Ctrl-C ends it")
        if no_browser or not webbrowser.open(door.as_uri()):
            callbacks.message(f"open this file in your browser: {door}")
        try:
            uvicorn.Server(
                uvicorn.Config(app, access_log=False, log_level="error", server_header=False, lifespan="off")
            ).run([listening])
        finally:
            scan.end()
            door.unlink(missing_ok=True)


def _listen(port: int) -> socket.socket:
    import socket

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1 if os.name == "posix" else 0)
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port} cannot be used ({reason}): choose another, or leave it out") from None
    return listening


def _write_door(door: Path, address: str) -> None:
    """A file that only this user reads, with the address that opens the studio once.

    The address is not on a command line, which other users can see.
    """
    door.parent.mkdir(parents=True, exist_ok=True)
    door.unlink(missing_ok=True)
    descriptor = os.open(door, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(_DOOR.format(address=address))


_DOOR = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Studio</title>
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={address}">
</head>
<body><a href="{address}">Open the studio</a></body>
</html>
"""
