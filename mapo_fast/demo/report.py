"""The demo's report: one HTML file that needs nothing else, and one picture for the README.

Every number comes from the dict that `report.json` holds; images are embedded as base64. The one script
is for the button that copies commands; nothing is fetched.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mapo_fast.demo import world
from mapo_fast.demo.score import Prompts, Samples
from mapo_fast.run.log import read_log
from mapo_fast.settings.schema import ObjectiveConfig

FIGURE_NAMES = {
    "preferred_share": "no colour named: the asked shape, in red",
    "unchanged_score": "colour named: the asked shape in the asked colour",
}


def model_names(objective: str) -> dict[str, str]:
    """Folder and key of each of the three models → its name in the report."""
    trained = "MaPO" if objective == "mapo" else objective
    return {"before": "before", "sft": "SFT control", objective: trained}


def next_command() -> str:
    """What to run on one's own pairs: the script next to the interpreter that runs now, if there is one."""
    python = Path(sys.executable)
    scripts = (python.with_name(name) for name in ("mapo-fast", "mapo-fast.exe"))
    script = next((path for path in scripts if path.is_file()), None)
    program = script or python
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    command = str(program) if script else f"{program} -m mapo_fast"
    return f"{command} train --preset lora --model YOUR_MODEL.safetensors --data YOUR_PAIRS"


Cells = dict[str, dict[str, Samples]]
"""Set of prompts ("preference", "unchanged") -> model -> its samples."""

_COLOURS = ("#777777", "#8a6d1a", "#b3261e")
"""Colours of the three models, in order."""
_COLUMNS, _SHOWN = 8, 48


def percent(result: Mapping[str, Any], figure: str, model: str) -> str:
    """For instance «76 % (71–81)»: a share and its 95 % interval."""
    low, high = result["intervals_95"][figure][model]
    return f"{100 * result[figure][model]:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def sheet(images: Sequence[Image.Image], columns: int = _COLUMNS, scale: int = 2) -> Image.Image:
    """Images side by side with a thin white gap, every pixel enlarged `scale` times."""
    cell = world.SIDE * scale + 4
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * cell - 4, rows * cell - 4), "white")
    for index, image in enumerate(images):
        large = image.resize((world.SIDE * scale, world.SIDE * scale), Image.Resampling.NEAREST)
        page.paste(large, (index % columns * cell, index // columns * cell))
    return page


def write_picture(
    path: Path, result: Mapping[str, Any], cells: Cells, prompts: Mapping[str, Prompts]
) -> None:
    """Draw 40 samples of the same seeds before and after both trainings, with the shares of all samples."""
    names = model_names(result["objective"])
    figure = Figure(figsize=(13.5, 7.5), dpi=110, facecolor="white")
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.012, right=0.988, top=0.885, bottom=0.015, wspace=0.04, hspace=0.36)
    rows = {"preference": "preferred_share", "unchanged": "unchanged_score"}
    what = {"preference": "red", "unchanged": "as asked"}
    for line, (name, key) in zip(axes, rows.items(), strict=True):
        for axis, (model, title), colour in zip(line, names.items(), _COLOURS, strict=True):
            axis.imshow(sheet(cells[name][model].images[:40], scale=4), interpolation="none")
            axis.set_axis_off()
            share = f"{100 * result[key][model]:.0f} % {what[name]}"
            axis.set_title(f"{title}: {share}", fontsize=16, color=colour, pad=7)
    texts = {
        "preference": f"Captions that name no colour, such as «{prompts['preference'].captions[0]}». "
        "Training preferred red over blue.",
        "unchanged": f"Captions that name a colour, such as «{prompts['unchanged'].captions[0]}». "
        "These must not change.",
    }
    for line, text in zip(axes, texts.values(), strict=True):
        top = line[0].get_position().y1
        figure.text(0.012, top + 0.074, text, fontsize=14, weight="bold", color="#222222")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def write_html(
    path: Path, result: Mapping[str, Any], cells: Cells, prompts: Mapping[str, Prompts], run: Path
) -> None:
    """Write the self-contained page.

    Args:
        path: the HTML file.
        result: contents of `report.json`.
        cells: all samples.
        prompts: the prompts of each set.
        run: the demo's folder, with `pairs/` and the two runs' `log.jsonl`.
    """
    objective = result["objective"]
    name = model_names(objective)[objective]
    known = ObjectiveConfig(name=objective).known
    without = "" if known.reference else " and needs no reference model"
    logs = {model: read_log(run / model / "log.jsonl") for model in ("sft", objective)}
    pairs = _pair_examples(run / "pairs" / "images")
    share = result["preferred_share"]
    sees, no_margin = "both images of a pair", ""
    if known.samples == "single":
        sees = "the same images one by one, each with a label"
        no_margin = f" {name}'s images have no partner: there is no such curve, and no held-out accuracy."
    body = f"""
<header>
<h1>A tiny SDXL learns to prefer red</h1>
<p>A small but complete Stable&nbsp;Diffusion&nbsp;XL pipeline was shown pairs of drawings that differ in
colour only: red was chosen, blue rejected, and the caption names no colour. {name} learns from
{sees}{without}; the SFT control starts from the same weights and sees only the chosen images.</p>
<p class="verdict">{_verdict(result)}</p>
</header>
<main>
<section>
<h2>Result</h2>
{_result_table(result)}
<p class="note">Shares of {result["samples_per_cell"]["preferred_share"]} images per cell, in brackets the
95&nbsp;% (Wilson) interval. A rule reads colour and shape from the pixels; it is right on every drawn image.
The same prompts and the same start noise were used for all three models.</p>
</section>
<section>
<h2>Captions that name no colour</h2>
<p>Such as «{html.escape(prompts["preference"].captions[0])}». The same place in each grid is the same caption
and the same start noise.</p>
{_grids(cells["preference"], result, "preferred_share", "in red")}
<h3>Which colours come out</h3>
{_colour_table(result)}
</section>
<section>
<h2>Captions that name a colour must not change</h2>
<p>Such as «{html.escape(prompts["unchanged"].captions[0])}». A preference that leaked into these would be a
defect, so a share that falls here counts against the training.</p>
{_grids(cells["unchanged"], result, "unchanged_score", "as asked")}
</section>
<section>
<h2>What it was trained on</h2>
<p>{result["settings"]["pairs"]} pairs like these, about a tenth of them held out (above: chosen, below:
rejected).</p>
<img class="pixels pairs" src="{pairs}"
alt="Eight pairs of drawings: the same shape in red above, in blue below.">
</section>
<section>
<h2>How the training went</h2>
<p>{_curves_text(logs, objective)}</p>
{_warnings(result)}
{_charts(logs, objective)}
<ul>
<li><b>Loss</b> alone says little: the two objectives differ, and {name}'s falls mostly by its
margin term.</li>
<li><b>Error</b> is the mean squared denoising error; it jumps because every step meets other noise levels.
{name} raises the rejected image's error much more than the chosen one's. Where the chosen one's rises too,
the trainer warns: that is the price of the margin, and a reason not to train longer.</li>
<li><b>Margin</b> is rejected minus chosen error: what {name} widens and SFT leaves almost
alone.{no_margin}</li>
<li><b>Saturation</b>, σ(z), is the share of the margin's gradient that is used up: near 1 the pairs are
learnt and more steps only do harm.</li>
<li><b>Preference accuracy</b> is the share of training pairs whose chosen image has the lower error. It has
no 50&nbsp;% baseline, so on <b>held-out</b> pairs only its change from the start counts (band: 95&nbsp;%
interval, paired).</li>
</ul>
</section>
<section>
<h2>Next: your own pairs</h2>
<div class="commands"><button type="button">Copy</button>
<pre><code>{html.escape(next_command())}</code></pre></div>
<p>YOUR_PAIRS holds two folders, <code>chosen</code> and <code>rejected</code>, with equal file names, and
each prompt in a text file next to the chosen picture; other formats are in docs/data.md. To run this page's
trainings again, use <code>config_{objective}.toml</code> and <code>config_sft.toml</code> next to it, with
another train.output.</p>
</section>
<section>
<h2>Settings</h2>
{_settings_table(result)}
</section>
</main>"""
    title = f"mapo_fast demo: red {share['before']:.0%} → {share[objective]:.0%}"
    page = _PAGE.replace("{title}", title).replace("{body}", body)
    path.write_text(page, encoding="utf-8")


def _verdict(result: Mapping[str, Any]) -> str:
    share, same, objective = result["preferred_share"], result["unchanged_score"], result["objective"]
    name = model_names(objective)[objective]
    return (
        f"Red where no colour is named: <b>{share['before']:.0%}</b> before, <b>{share['sft']:.0%}</b> with "
        f"SFT, <b>{share[objective]:.0%}</b> with {name}. Right shape and colour where one is named: "
        f"{same['before']:.0%} before, {same[objective]:.0%} after {name}."
    )


def _result_table(result: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in FIGURE_NAMES.values())
    rows = ""
    for model, name in model_names(result["objective"]).items():
        cells, bar = "", model if model in ("before", "sft") else "trained"
        for figure in FIGURE_NAMES:
            width = 100 * result[figure][model]
            cells += (
                f'<td>{percent(result, figure, model)}<span class="bar" aria-hidden="true">'
                f'<span class="{bar}" style="width:{width:.1f}%"></span></span></td>'
            )
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _colour_table(result: Mapping[str, Any]) -> str:
    colours = [*world.COLOURS, "none"]
    head = "".join(f'<th scope="col">{"none clear" if name == "none" else name}</th>' for name in colours)
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{result['colours'][model][colour]:.0%}</td>" for colour in colours)
        + "</tr>"
        for model, name in model_names(result["objective"]).items()
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _settings_table(result: Mapping[str, Any]) -> str:
    values = {"seed": result["seed"], **result["settings"], **result["versions"]}
    values["seconds, all together"] = f"{result['seconds']:.0f}"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="wide" tabindex="0"><table class="small"><tbody>{rows}</tbody></table></div>'


def _grids(samples: Mapping[str, Samples], result: Mapping[str, Any], figure: str, what: str) -> str:
    parts = []
    for model, name in model_names(result["objective"]).items():
        text = f"{name}: {result[figure][model]:.0%} {what}"
        images = samples[model].images[:_SHOWN]
        parts.append(
            f'<figure><figcaption>{text}</figcaption><img class="pixels" src="{_png(sheet(images))}" '
            f'alt="Grid of {len(images)} samples, {text}"></figure>'
        )
    return f'<div class="grids">{"".join(parts)}</div>'


def _pair_examples(folder: Path) -> str:
    chosen = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*_chosen.png"))[:8]]
    rejected = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*_rejected.png"))[:8]]
    return _png(sheet([*chosen, *rejected], columns=len(chosen)))


Plot = Callable[[Axes, str, list[dict[str, Any]], dict[str, Any]], None]
"""Draws one model's curve: axes, model, its log, style."""


def _charts(logs: Mapping[str, list[dict[str, Any]]], objective: str) -> str:
    """A chart for each figure, in a grid that has as many columns as the page is wide for."""
    names = model_names(objective)
    charts: dict[str, Plot] = {
        "Loss": _curve("loss"),
        "Error": _plot_errors,
        "Margin": _curve("margin"),
        "Saturation": _curve("saturation", only=objective),  # SFT has no margin term that could saturate
        "Preference accuracy": _curve("accuracy"),
        "Held-out accuracy, change": _plot_held_out,
    }
    parts = []
    for title, plot in charts.items():
        figure = Figure(figsize=(4.2, 3.1), facecolor="white", layout="constrained")
        axes = figure.subplots()
        for (model, entries), colour in zip(logs.items(), _COLOURS[1:], strict=True):
            plot(axes, model, entries, {"color": colour, "label": names[model], "linewidth": 1.8})
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if title in ("Saturation", "Preference accuracy"):
            axes.set_ylim(0, 1.03)
        if not axes.lines:
            continue
        axes.legend(frameon=False, fontsize=8)
        caption = html.escape(title)
        parts.append(
            f'<figure><figcaption>{caption}</figcaption><img class="chart" src="{_svg(figure)}" '
            f'alt="Curves of {caption} over the optimizer steps"></figure>'
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def _rows(entries: list[dict[str, Any]], event: str, key: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["event"] == event and key in entry]


def _curve(key: str, only: str | None = None) -> Plot:
    """Plot a figure of the log's training steps; of one model only if `only` is given."""

    def plot(axes: Axes, model: str, entries: list[dict[str, Any]], style: dict[str, Any]) -> None:
        rows = _rows(entries, "step", key)
        if rows and only in (None, model):
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], **style)

    return plot


def _plot_errors(axes: Axes, model: str, entries: list[dict[str, Any]], style: dict[str, Any]) -> None:
    for key, dash in (("chosen_error", "-"), ("rejected_error", "--")):
        label = f"{style['label']}, {key.split('_')[0]}"
        _curve(key)(axes, model, entries, {**style, "label": label, "linestyle": dash})


def _plot_held_out(axes: Axes, model: str, entries: list[dict[str, Any]], style: dict[str, Any]) -> None:
    rows = _rows(entries, "evaluation", "accuracy_change")
    if not rows:  # single images have no accuracy
        return
    changes, steps = [row["accuracy_change"] for row in rows], [row["step"] for row in rows]
    axes.plot(steps, [change["mean"] for change in changes], **style, marker="o", markersize=4)
    # The interval is missing where only one pair is held out.
    low = [change["mean"] if change["low"] is None else change["low"] for change in changes]
    high = [change["mean"] if change["high"] is None else change["high"] for change in changes]
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _warnings(result: Mapping[str, Any]) -> str:
    """The trainer's warnings in each run."""
    names = model_names(result["objective"])
    rows = [
        f"<li><b>{names[model]}, step {one['step']}:</b> {html.escape(one['message'])}</li>"
        for model, found in result["warnings"].items()
        for one in found
    ]
    if not rows:
        return '<p class="note">The trainer gave no warning in either run.</p>'
    return f'<div class="warned"><p><b>The trainer warned:</b></p><ul>{"".join(rows)}</ul></div>'


def _curves_text(logs: Mapping[str, list[dict[str, Any]]], objective: str) -> str:
    """The charts in words."""
    names = model_names(objective)
    parts = []
    for model, entries in logs.items():
        rows = [entry for entry in entries if entry["event"] == "step"]
        figures = [("margin", ".4f"), ("accuracy", ".2f")]
        changes = [
            f"from {'an' if figure == 'accuracy' else 'a'} {figure} of {rows[0][figure]:{digits}} to "
            f"{rows[-1][figure]:{digits}}"
            for figure, digits in figures
            if figure in rows[0]
        ]
        parts.append(f"{names[model]} goes {' and '.join(changes)}")
    return html.escape("; ".join(parts) + ".")


def _png(image: Image.Image) -> str:
    # Flat colours: a palette of 256 is a third of the size and looks the same.
    buffer = io.BytesIO()
    image.quantize(256).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "mapo_fast"}):  # the same file for the same curves
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; color: #1c1c1c; background: #fff;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { margin: 3rem 0 0.5rem; font-size: 1.4rem; }
h3 { margin: 1.5rem 0 0.5rem; font-size: 1.1rem; }
p, li { max-width: 46rem; }
.verdict { font-size: 1.2rem; padding: 0.8rem 1rem; background: #f6efe6; border-left: 5px solid #b3261e; }
.note { color: #555; font-size: 0.92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.45rem 1.1rem 0.45rem 0; border-bottom: 1px solid #ddd; }
thead th { color: #555; font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
td { white-space: nowrap; }
.small { font-size: 0.9rem; }
.bar { display: block; min-width: 6rem; height: 0.5rem; background: #ececec; margin-top: 0.25rem; }
.bar span { display: block; height: 100%; }
.before { background: #777; } .sft { background: #8a6d1a; } .trained { background: #b3261e; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; }
figcaption { font-weight: 600; padding: 0.3rem 0; }
img { max-width: 100%; height: auto; }
.pixels { image-rendering: pixelated; width: 100%; }
.pairs { max-width: 40rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.chart { width: 100%; }
.warned { padding: 0.1rem 1rem; background: #fff6dd; border-left: 5px solid #b98900; max-width: 46rem;
  overflow-wrap: anywhere; }
.commands { position: relative; }
.commands button { position: absolute; top: 0.4rem; right: 0.4rem; font: inherit; font-size: 0.85rem; }
pre { background: #f4f4f4; padding: 2.6rem 1rem 0.9rem; font-size: 0.9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
</style>
</head>
<body>{body}
<script>
for (const button of document.querySelectorAll(".commands button")) {
  button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(button.parentElement.querySelector("code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);  // what is selected can be copied where the page may not
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });
}
</script>
</body>
</html>
"""
