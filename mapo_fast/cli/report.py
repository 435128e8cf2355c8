"""`mapo-fast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mapo_fast.util.console import Terminal, output_may_fail
from mapo_fast.util.errors import UserError


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; report.html in the run's folder by default.")
    ] = None,
    full_paths: Annotated[
        bool, typer.Option("--full-paths", help="Show paths as they are, not only their last part.")
    ] = False,
) -> None:
    """Write one offline page of a run: held-out figures, previews, data, settings, warnings."""
    from mapo_fast.run.report import write_report
    from mapo_fast.util.files import disk_errors

    output_may_fail()
    page = run / "report.html" if out is None else out
    if page.is_dir():
        raise UserError(f"--out {page} is a folder: name a file")
    with disk_errors(page):
        write_report(run, page, full_paths=full_paths)
    Terminal().message(f"page: {page}")
