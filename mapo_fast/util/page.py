"""HTML pages that need nothing else and may do nothing else: all is inside, and a policy forbids the rest."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapo_fast.util.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #595959; --line: #ddd;
  --bar: #b3261e; --second: #2f6bb3; --third: #7d6116; --field: #f4f4f4; --mark: #fff6dd; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #161616; --soft: #aaa; --line: #3a3a3a;
  --bar: #ff7a70; --second: #7fb1ee; --third: #d3b04a; --field: #242424; --mark: #3a3115; } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.4rem; }
p, li { max-width: 46rem; } .note { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem 1rem .4rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.mark { padding: .1rem 1rem; background: var(--mark); border-left: 5px solid #b98900; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .9rem; padding: .2rem 0; } img { max-width: 100%; height: auto; }
svg { width: 100%; height: auto; } pre { background: var(--field); padding: .8rem; white-space: pre-wrap; }
.c0 { color: var(--bar); } .c1 { color: var(--second); } .c2 { color: var(--third); }
.zero { stroke: currentColor; opacity: .4; }
.line { fill: none; stroke: currentColor; stroke-width: 2; } .band { fill: currentColor; opacity: .18; }
button { font: inherit; padding: .5rem 1rem; } :focus-visible { outline: 3px solid #1a73e8; }
"""


def write_page(
    path: Path, title: str, body: str, *, script: str = "", data: Any = None, style: str = ""
) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the file.
        title: plain text.
        body: HTML, in which everything from outside is escaped.
        script: run at the end; it reads `data` by `JSON.parse(document.getElementById("data").textContent)`.
        data: for the script, as JSON in a block that it cannot leave.
        style: added to `STYLE`.

    Raises:
        OSError: the disk.
    """
    style = STYLE + style
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; base-uri 'none'; "
        f"form-action 'none'; script-src {_allowed(script)}"
    )
    block = "" if data is None else f'<script type="application/json" id="data">{embedded(data)}</script>'
    tail = f"<script>{script}</script>" if script else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{block}{tail}\n"
        "</body>\n</html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def scrolling(table: str) -> str:
    """A table that scrolls, by keyboard too, where the page is narrower."""
    return f'<div class="wide" tabindex="0">{table}</div>'


def _allowed(script: str) -> str:
    """Content security policy of a page: its own script, or none."""
    return f"'sha256-{_digest(script)}'" if script else "'none'"


def embedded(data: Any) -> str:
    """JSON that cannot end the block it stands in, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def image_url(image: Image, side: int, quality: int = 88) -> str:
    """A JPEG for the page, at most `side` pixels each way: nothing but the pixels of what was read."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    small.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
