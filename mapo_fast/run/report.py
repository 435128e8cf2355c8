"""`mapo-fast report`: one page of a run, offline, from what its folder and its cache hold."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_fast import __version__
from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.run.chart import Curve, chart
from mapo_fast.run.folder import read_run
from mapo_fast.run.log import LOG_FILE, read_log
from mapo_fast.run.starts import last_settings
from mapo_fast.util.console import command_line
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import parse_json, read_bytes
from mapo_fast.util.page import image_url, scrolling, write_page

_PREVIEW = 640
_LARGEST = 2**28
_STYLE = """
.slide { position: relative; max-width: 40rem; } .slide img { display: block; width: 100%; }
.slide > div { position: absolute; inset: 0 auto 0 0; overflow: hidden; resize: horizontal; width: 50%;
  border-right: 3px solid var(--bar); }
.slide > div img { width: 40rem; max-width: none; height: 100%; object-fit: cover; object-position: left; }
"""


def write_report(run: Path, out: Path, *, full_paths: bool = False) -> None:
    """Write the page of a run, finished or not.

    Args:
        run: the run's folder.
        out: the HTML file.
        full_paths: show paths as they are; otherwise only their last part.

    Raises:
        UserError: it is no run's folder, or its files are damaged.
        OSError: the disk.
    """
    record = read_run(run)
    if record is None:
        raise UserError(f"{run} is no run's folder: it has no run.json")
    entries = read_log(run / LOG_FILE) if (run / LOG_FILE).is_file() else []
    settings = last_settings(run)
    body = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        _state(entries),
        _start(entries, full_paths),
        _warnings(entries, None if full_paths else run),
        _held_out(entries),
        _training(entries),
        _previews(run),
        _data(Path(str(record.config["data"]["cache"])), full_paths),
        _settings(settings, full_paths),
    ]
    write_page(out, f"mapo_fast: {run.resolve().name}", "\n".join(filter(None, body)), style=_STYLE)


def _of(entries: Iterable[Mapping[str, Any]], event: str, key: str = "step") -> list[Mapping[str, Any]]:
    return [entry for entry in entries if entry["event"] == event and key in entry]


def _state(entries: Sequence[Mapping[str, Any]]) -> str:
    start, ends = _of(entries, "start"), _of(entries, "end")
    if not start:
        return "<p>The run has not taken a step yet.</p>"
    done, total = max(int(entry["step"]) for entry in entries), start[-1].get("total_steps", "?")
    finished = bool(ends) and ends[-1].get("finished") is True
    words = "finished" if finished else "not finished: mapo-fast train --resume continues it"
    seconds = sum(float(entry.get("seconds", 0)) for entry in ends)
    return f"<p>Step {done} of {total}, {words}; {seconds / 60:.1f} min in all.</p>"


def _start(entries: Sequence[Mapping[str, Any]], full_paths: bool) -> str:
    """The newest start's command, device and versions, and the memory that was planned and used."""
    starts, steps = _of(entries, "start"), _of(entries, "step", "peak_memory_mib")
    if not starts:
        return ""
    start, rows = starts[-1], []
    if isinstance(words := start.get("command"), list):
        words = [str(word) for word in words]
        rows.append(("command", command_line(words) if full_paths else " ".join(map(_word, words))))
    rows.append(("device", str(start.get("device", "not recorded"))))
    if "planned_memory_mib" in start:
        planned, reserved = (float(start[f"planned_{name}_mib"]) for name in ("memory", "reserved"))
        rows.append(("memory, planned", f"{planned:,.0f} MiB, {reserved:,.0f} MiB reserved"))
    if steps:
        rows.append(("memory, peak", f"{max(float(e['peak_memory_mib']) for e in steps):,.0f} MiB"))
    if isinstance(versions := start.get("versions"), dict):
        versions = {"mapo_fast": start.get("version"), **versions}
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return _rows(rows)


def _word(word: str) -> str:
    """A word of a command, such as --model=/home/me/a.safetensors, with its path shortened."""
    name, equals, value = word.rpartition("=")
    text = f"{name}{equals}{_value(value, full_paths=False)}"
    return f'"{text}"' if " " in text else text


def _warnings(entries: Sequence[Mapping[str, Any]], run: Path | None) -> str:
    """The warnings of the log; the path of `run` in them is shortened."""
    found = ""
    for entry in _of(entries, "warning", "message"):
        message = str(entry["message"])
        for folder in () if run is None else (str(run), str(run.resolve())):
            message = message.replace(folder, f"…/{Path(folder).name}")
        found += f"<li>step {entry['step']}: {html.escape(message)}</li>"
    return f'<div class="mark"><p><b>Warnings</b></p><ul>{found}</ul></div>' if found else ""


_CHANGES = {
    "chosen_error_change": ("Chosen error, change", "should not rise"),
    "rejected_error_change": ("Rejected error, change", ""),
    "margin_change": ("Margin, change", "should rise"),
    "accuracy_change": ("Preference accuracy, change", "should rise"),
}


def _held_out(entries: Sequence[Mapping[str, Any]]) -> str:
    """Held-out figures against the start model, each with its 95 % interval."""
    charts = []
    for key, (title, hope) in _CHANGES.items():
        rows = [entry for entry in _of(entries, "evaluation", key) if isinstance(entry[key], dict)]
        if rows:
            points = [(float(r["step"]), float(r[key]["mean"])) for r in rows]
            band = [_band(r[key]) for r in rows]
            name = f"{title} ({hope})" if hope else title
            curves = [Curve("held out", points, band)]
            averaged = [row for row in rows if isinstance(row.get("ema"), dict) and key in row["ema"]]
            if averaged:
                points = [(float(r["step"]), float(r["ema"][key]["mean"])) for r in averaged]
                curves.append(
                    Curve("average of the weights", points, [_band(r["ema"][key]) for r in averaged])
                )
            charts.append(chart(name, curves))
    if not charts:
        return "<h2>Held-out pairs</h2><p>No pair is held out, or none is evaluated yet.</p>"
    return (
        '<h2>Held-out pairs</h2><p class="note">Changes against the start model; the band is the 95 % '
        f'interval.</p><div class="grid">{"".join(charts)}</div>{_by_noise(entries)}'
    )


def _by_noise(entries: Sequence[Mapping[str, Any]]) -> str:
    """The newest changes at each noise level, with their intervals."""
    found = _of(entries, "evaluation", "bins")
    if not found or not isinstance(bins := found[-1]["bins"], dict):
        return ""
    keys = [key for key in _CHANGES if all(isinstance(one.get(key), dict) for one in bins.values())]
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("timesteps", *(_CHANGES[key][0] for key in keys))
    )
    lines = ""
    for level, one in bins.items():
        cells = "".join(f"<td>{_interval(one[key])}</td>" for key in keys)
        lines += f'<tr><th scope="row">{html.escape(str(level))}</th>{cells}</tr>'
    return (
        f'<h3>By noise level, step {found[-1]["step"]}</h3><p class="note">Shares of the timesteps, from '
        "little noise (details) to much (composition).</p>"
        + scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")
    )


def _interval(change: Mapping[str, Any]) -> str:
    low, high = _band(change)
    return f"{float(change['mean']):+.4f} [{low:+.4f}, {high:+.4f}]"


def _band(change: Mapping[str, Any]) -> tuple[float, float]:
    low, high = change.get("low"), change.get("high")
    mean = float(change["mean"])
    return mean if low is None else float(low), mean if high is None else float(high)


def _training(entries: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for title, keys in {
        "Loss": ("loss",),
        "Error": ("chosen_error", "rejected_error"),
        "Margin": ("margin",),
        "Saturation": ("saturation",),
    }.items():
        curves = [
            Curve(key.replace("_", " "), [(float(e["step"]), float(e[key])) for e in rows])
            for key in keys
            if (rows := _of(entries, "step", key))
        ]
        if curves:
            charts.append(chart(title, curves))
    return f'<h2>Training pairs</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _previews(run: Path) -> str:
    """First and last previews of each prompt: drag the edge of the upper image to compare."""
    folders = sorted((run / "previews").glob("step-*"))
    if len(folders) < 2:
        return ""
    parts = []
    for after in sorted(folders[-1].glob("*.png")):
        before = folders[0] / after.name
        urls = [_picture(path) for path in (before, after)]
        if all(urls):
            name = html.escape(after.stem)
            parts.append(
                f'<h3>{name}</h3><div class="slide"><img src="{urls[1]}" alt="{name}, after">'
                f'<div><img src="{urls[0]}" alt="{name}, before"></div></div>'
            )
    if not parts:
        return ""
    return (
        '<h2>Previews</h2><p class="note">Left of the line: before. Drag the lower right corner of the left '
        f"part.</p>{''.join(parts)}"
    )


def _picture(path: Path) -> str | None:
    try:
        return image_url(decode_image(read_bytes(path, _LARGEST)), _PREVIEW)
    except (OSError, ImageProblemError):  # anybody may have moved or changed it
        return None


def _data(cache: Path, full_paths: bool) -> str:
    """The data card: what was trained on, what was left out, and what gives the label away."""
    rows: list[tuple[str, str]] = [("cache", _path(cache, full_paths))]
    try:
        index = parse_json(read_bytes(cache / "index.json", _LARGEST))
        pairs, train = index["pairs"], index["train"]
        rows += [("pairs for training", f"{train:,}"), ("held out", f"{pairs - train:,}")]
        warned = [text for text in index["summary"]["warnings"] if isinstance(text, str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"<h2>Data</h2><p>The cache {html.escape(rows[0][1])} is not there any more.</p>"
    for reason, count in _skipped(cache / "skipped.jsonl").most_common():
        rows.append((f"skipped: {reason}", f"{count:,}"))
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in warned)
    mark = f'<div class="mark"><ul>{notes}</ul></div>' if notes else ""
    return f"<h2>Data</h2>{mark}{_rows(rows)}"


def _skipped(path: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    try:
        lines = read_bytes(path, _LARGEST).decode("utf-8", "replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            found[str(parse_json(line)["reason"])] += 1
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _settings(settings: Mapping[str, Mapping[str, Any]], full_paths: bool) -> str:
    """The settings of the newest start, with where each comes from."""
    lines = ""
    for name, one in settings.items():
        cells = name, _value(one.get("value"), full_paths), str(one.get("from", ""))
        lines += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("setting", "value", "from"))
    return f"<h2>Settings</h2><p>mapo_fast {html.escape(__version__)} wrote this page.</p>" + scrolling(
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _value(value: Any, full_paths: bool) -> str:
    if isinstance(value, str) and not full_paths and (Path(value).is_absolute() or value.startswith("~")):
        return _path(Path(value), full_paths)
    if value is None:
        return "unset"
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _path(path: Path, full_paths: bool) -> str:
    """Others need not know where a user keeps files."""
    return str(path) if full_paths else f"…/{path.name}"


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    def lines() -> Iterator[str]:
        for name, value in rows:
            yield f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'

    return scrolling(f"<table><tbody>{''.join(lines())}</tbody></table>")
