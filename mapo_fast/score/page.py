"""The page of an evaluation: figures, distributions, and the largest wins and losses side by side."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_fast.score.manifest import Made
from mapo_fast.score.scores import open_image
from mapo_fast.score.statistics import FEWEST_FOR_MEAN, FEWEST_FOR_WIN_RATE
from mapo_fast.util.page import image_url, scrolling, write_page

_SHOWN = 6
_SIDE = 384
_WIDTH, _HEIGHT, _BINS = 420, 130, 24


def write_evaluation(path: Path, result: Mapping[str, Any], images: Mapping[str, Sequence[Made]]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        result: what `evaluate` returns.
        images: of each model, in the same order.

    Raises:
        UserError: an image cannot be read.
        OSError: the disk.
    """
    first, *others = result["models"]
    body = [
        "<h1>" + html.escape(" and ".join([*others, first]) if others else first) + "</h1>",
        f"<p>{len(result['prompts'])} prompts, {result['images_per_model']} images of each model, the same "
        f"seeds. Win rates are over prompts, against <b>{html.escape(first)}</b>: wins + ½ ties. "
        f"Intervals are 95 %: from {FEWEST_FOR_WIN_RATE} prompts on for win rates, "
        f"from {FEWEST_FOR_MEAN} on for means.</p>",
        _table(result),
    ]
    for name in result["results"]:
        body.append(f"<h2>{html.escape(name)}</h2>{_distributions(result, name)}")
        for model in others:
            body.append(_extremes(result, name, first, model, images))
    body.append(_run(result))
    write_page(path, "mapo_fast evaluation", "\n".join(body))


def interval_text(interval: Sequence[float] | None, form: str) -> str:
    """`[low, high]`, or that there are too few prompts for an interval."""
    return (
        "(too few prompts for an interval)"
        if interval is None
        else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
    )


def as_lines(result: Mapping[str, Any]) -> list[str]:
    """The table as lines of text."""
    first, lines = next(iter(result["models"])), []
    for name, found in result["results"].items():
        for model, mean in found["means"].items():
            line = f"{name}, {model}: mean {mean['value']:.4g} {interval_text(mean['interval'], '.4g')}"
            if against := found["against_first"].get(model):
                interval = interval_text(against["interval"], ".0%")
                line += f"; wins {against['rate']:.0%} against {first} {interval}"
            lines.append(line)
    return lines


def _table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, found in result["results"].items():
        for model, mean in found["means"].items():
            against = found["against_first"].get(model)
            won = (
                "–"
                if against is None
                else f"{against['rate']:.0%} {interval_text(against['interval'], '.0%')}"
            )
            counts = (
                "–" if against is None else f"{against['wins']} / {against['ties']} / {against['losses']}"
            )
            cells = [
                name,
                model,
                f"{mean['value']:.4g} {interval_text(mean['interval'], '.4g')}",
                won,
                counts,
            ]
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("scorer", "model", "mean", "win rate", "wins / ties / losses")
    )
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")


def _distributions(result: Mapping[str, Any], name: str) -> str:
    """A histogram over prompts for each model, on one scale."""
    by_model = {model: [p["scores"][name][model] for p in result["prompts"]] for model in result["models"]}
    low = min(min(values) for values in by_model.values())
    high = max(max(values) for values in by_model.values())
    parts = []
    for model, values in by_model.items():
        counts = [0] * _BINS
        for value in values:
            counts[min(_BINS - 1, int((value - low) / (high - low or 1) * _BINS))] += 1
        wide, top = _WIDTH / _BINS, max(counts)
        bars = "".join(
            f'<rect x="{i * wide:.1f}" y="{_HEIGHT * (1 - count / top):.1f}" width="{wide - 1:.1f}" '
            f'height="{_HEIGHT * count / top:.1f}" fill="var(--bar)"/>'
            for i, count in enumerate(counts)
        )
        text = f"{model}: {len(values)} prompts from {min(values):.4g} to {max(values):.4g}"
        parts.append(
            f'<figure><svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{html.escape(text)}">'
            f"{bars}</svg><figcaption>{html.escape(text)}</figcaption></figure>"
        )
    return f'<div class="grid">{"".join(parts)}</div>'


def _extremes(
    result: Mapping[str, Any], name: str, first: str, model: str, images: Mapping[str, Sequence[Made]]
) -> str:
    changes = [(p["scores"][name][model] - p["scores"][name][first], p["prompt"]) for p in result["prompts"]]
    ranked = sorted(changes, reverse=True)
    wins = [one for one in ranked[:_SHOWN] if one[0] > 0]
    losses = [one for one in ranked[::-1][:_SHOWN] if one[0] < 0]
    parts = []
    for title, found in ((f"{model}: largest wins", wins), (f"{model}: largest losses", losses)):
        if found:
            parts.append(f"<h3>{html.escape(title)}</h3>")
            parts += [_side_by_side(prompt, change, (first, model), images) for change, prompt in found]
    return "".join(parts)


def _side_by_side(
    prompt: str, change: float, models: Iterable[str], images: Mapping[str, Sequence[Made]]
) -> str:
    figures = []
    for model in models:
        made = next(one for one in images[model] if one.prompt == prompt)
        url = image_url(open_image(made.path), _SIDE)
        label = html.escape(f"{model}, seed {made.seed}")
        figures.append(f'<figure><img src="{url}" alt="{label}"><figcaption>{label}</figcaption></figure>')
    text = html.escape(prompt)
    return (
        f'<p>{text} <span class="note">({change:+.4g})</span></p><div class="grid">{"".join(figures)}</div>'
    )


def _run(result: Mapping[str, Any]) -> str:
    rows = [(f"model {name}", f"…/{Path(folder).name}") for name, folder in result["models"].items()]
    for name, how in result["settings"].items():
        said = ", ".join(f"{key} {value}" for key, value in how.items() if key != "model" and value != "")
        rows.append((f"{name} was sampled with", said or "not recorded"))
    for name, one in result["scorers"].items():
        rows.append((f"scorer {name}", f"{one['version']}, SHA-256 {one['sha256'] or '– (no weights)'}"))
    for model, value in result["diversity"].items():
        rows.append((f"diversity of {model}", "one seed a prompt" if value is None else f"{value:.4f}"))
    lines = "".join(
        f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in rows
    )
    return "<h2>What was run</h2>" + scrolling(f"<table><tbody>{lines}</tbody></table>")
