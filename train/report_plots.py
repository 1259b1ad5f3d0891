"""The report's pictures, as SVG that takes the page's text colour and its series colours, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.report_verdict import value_of

Report = Mapping[str, Any]

INK = "#010203"  # drawn in these colours, shown in those of the page's style sheet
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
DASHES = ("-", "--", ":")  # after the last colour, the first comes again with other dashes
_MOST_POINTS = 400  # of one curve; more cannot be seen at this size
SETTINGS = {
  "svg.fonttype": "none",  # text stays text
  "font.family": "sans-serif",
  "font.size": 9,
  "text.parse_math": False,  # a "$" in a name is a "$"
}


def loss_curves(report: Report) -> str:
  """Draws training loss over steps: the main line's stages one after the other, and the arms, each from step 0.

  Args:
    report: see `train/report.py`.

  Returns:
    HTML with inline SVG; "" where no stage has a curve.
  """
  from matplotlib import rc_context

  stages = [stage for stage in report["stages"] if _curve(stage)[0]]
  main = [stage for stage in stages if stage.get("kind", "main") == "main"]
  arms = [stage for stage in stages if stage.get("kind", "main") != "main"]
  parts = []
  with rc_context(SETTINGS):
    if main:
      parts.append(_curves(main, "The main line, stage after stage", follow=True))
    if arms:
      parts.append(_curves(arms, "The comparison arms, from their first step", follow=False))
  return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def task_curves(report: Report, key: str, what: str, least: int = 2) -> str:
  """Draws a figure of each task over steps: the main line's stages one after the other, and each arm by itself.

  Args:
    report: see `train/report.py`.
    key: of a stage: [[step, {task: figure}]].
    what: the figures are.
    least: tasks that a stage must have for its figures to say something; shares of one are all 1.

  Returns:
    HTML with inline SVG; "" where no stage has as many tasks.
  """
  from matplotlib import rc_context

  known = {stage["name"]: {name for _, found in stage.get(key) or [] for name in found} for stage in report["stages"]}
  stages = [stage for stage in report["stages"] if known[stage["name"]]]
  names = list(dict.fromkeys(name for stage in stages for _, found in stage[key] for name in found))
  main = [stage for stage in stages if stage.get("kind", "main") == "main"]
  groups = [("the main line, stage after stage", main)] if main else []
  groups += [(stage["name"], [stage]) for stage in stages if stage not in main]
  with rc_context(SETTINGS):
    parts = [
      _task_curves(group, key, names, f"{what}: {title}")
      for title, group in groups
      if any(len(known[stage["name"]]) >= least for stage in group)
    ]
  return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _task_curves(stages: Sequence[Mapping[str, Any]], key: str, names: Sequence[str], title: str) -> str:
  figure, axis = new_figure(5.4, 3.1)
  offset, labelled = 0, set()
  for number, stage in enumerate(stages):
    for place, name in enumerate(names):
      points = _thinned([(step, found[name]) for step, found in stage[key] if name in found])
      if not points:
        continue
      steps, values = zip(*points, strict=True)
      look = look_of(place) | {"linewidth": 1.5, "marker": "o", "markersize": 3.0 if len(points) < 40 else 0.0}
      places = [offset + step for step in steps]
      numbers = [math.nan if value is None else value for value in values]
      axis.plot(places, numbers, label=None if name in labelled else name, **look)
      labelled.add(name)
    best = stage.get("best")
    if key == "validation" and best:
      axis.plot([offset + best["step"]], [best["value"]], "o", color=INK, fillstyle="none", markersize=10)
    offset += max(stage.get("steps") or 0, stage[key][-1][0])
    if number < len(stages) - 1:
      mark_end(axis, offset)
  # Above the lines: with as many sources as a mixture has, there is no room among them.
  return _over_steps(figure, axis, title, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def task_bars(report: Report) -> str:
  """Draws each task's metric for every stage, with its interval, and baseline.

  Args:
    report: see `train/report.py`.

  Returns:
    HTML with inline SVG; "" where there are no tasks.
  """
  from matplotlib import rc_context

  with rc_context(SETTINGS):
    parts = [_bars(report, skill) for skill in report["skills"] if skill["kind"] != "perplexity"]
  return f'<div class="figures">{"".join(parts)}</div>' if any(parts) else ""


def reliability_diagram(name: str, found: Mapping[str, Any]) -> str:
  """Draws accuracy over confidence, bin by bin, before and after the temperature; a dot's area is its rows.

  Args:
    name: the task's.
    found: its "calibration", see `train/report.py`.
  """
  from matplotlib import rc_context

  with rc_context(SETTINGS):
    figure, axis = new_figure(4.2, 3.4)
    axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.45, linestyle=(0, (4, 3)))
    curves = [("temperature 1", "before", SERIES[1])]
    curves += [(f"temperature {found['temperature']:.2f}", "after", SERIES[0])] if found["rows"] else []
    for label, key, colour in curves:
      rows, sure, right = zip(*found["reliability"][key], strict=True)
      sizes = [12 + 120 * count / sum(rows) for count in rows]
      axis.plot(sure, right, color=colour, linewidth=1.4, label=label)
      axis.scatter(sure, right, s=sizes, color=colour, linewidths=0)
    axis.set_xlabel("probability of the label")
    axis.set_ylabel("share that is right")
    axis.set_xlim(0, 1.03)
    axis.set_ylim(0, 1.03)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    return svg(figure, f"{name}: reliability")


def coverage_curve(name: str, found: Mapping[str, Any]) -> str:
  """Draws the accuracy of the surest share of texts, and where the threshold lies, if there is one.

  Args:
    name: the task's.
    found: its "calibration", see `train/report.py`.
  """
  from matplotlib import rc_context

  with rc_context(SETTINGS):
    figure, axis = new_figure(4.2, 3.4)
    _, share, right = zip(*found["curve"], strict=True)
    marker = "o" if len(share) == 1 else None
    axis.plot(share, right, color=SERIES[0], linewidth=1.7, drawstyle="steps-pre", marker=marker)
    if found["threshold"] is not None and found["accuracy"] is not None:
      axis.plot([found["coverage"]], [found["accuracy"]], "o", color=SERIES[1], label=f"from {found['threshold']:.2f}")
      axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left")
    axis.set_xlabel("share of texts that are labelled")
    axis.set_ylabel("share of those that is right")
    axis.set_xlim(0, 1.03)
    axis.set_ylim(min(right) - 0.05, 1.03)
    return svg(figure, f"{name}: coverage and accuracy")


def _curve(stage: Mapping[str, Any]) -> tuple[list[float], list[float]]:
  """Returns steps and losses, thinned; a loss that is not finite leaves a gap."""
  kept = _thinned(stage.get("loss") or [])
  return [step for step, _ in kept], [math.nan if loss is None else loss for _, loss in kept]


def _thinned(points: Sequence[Any]) -> list[Any]:
  stride = math.ceil(len(points) / _MOST_POINTS) or 1
  return [*points[:-1:stride], *points[-1:]]


def _curves(stages: Sequence[Mapping[str, Any]], title: str, follow: bool) -> str:
  figure, axis = new_figure(5.4, 3.1)
  offset = 0
  for number, stage in enumerate(stages):
    steps, losses = _curve(stage)
    marker = "o" if len(steps) == 1 else None  # one point makes no line
    places = [offset + step for step in steps]
    axis.plot(places, losses, label=stage["name"], linewidth=1.7, marker=marker, **look_of(number))
    if follow:
      offset += max(stage.get("steps") or 0, steps[-1])
      if number < len(stages) - 1:
        mark_end(axis, offset)
  axis.set_ylabel("nats a target token")
  return _over_steps(figure, axis, title, loc="upper right")


def look_of(number: int) -> dict[str, Any]:
  """Returns colour and dashes of a figure's line: after the last colour, the first comes again, dashed."""
  return {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[number // len(SERIES) % len(DASHES)]}


def mark_end(axis: Any, step: float) -> None:
  """Marks where a stage ends."""
  axis.axvline(step, color=INK, linewidth=0.7, alpha=0.45, linestyle=(0, (4, 3)))


def _over_steps(figure: Any, axis: Any, title: str, **legend: Any) -> str:
  axis.set_xlabel("optimizer step")
  axis.set_ylim(bottom=0)
  axis.set_xlim(left=0)
  axis.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
  axis.legend(frameon=False, fontsize=8, labelcolor=INK, **legend)
  return svg(figure, title)


def _bars(report: Report, skill: Mapping[str, Any]) -> str:
  name = skill["name"]
  rows = [(s["name"], value_of(report, s["name"], name), s.get("kind", "main")) for s in report["stages"]]
  found = report.get("baselines", {}).get(name, {})
  rows += [(baseline.replace("_", " "), found[baseline].get("value"), "baseline") for baseline in sorted(found)]
  values = [value for _, value, _ in rows if value is not None]
  if not values:
    return ""
  matrix = report.get("matrix", {})
  intervals = {s["name"]: matrix.get(s["name"], {}).get(name, {}).get("interval") for s in report["stages"]}
  shares = all(0 <= value <= 1 for value in values)
  reached = [*values, *(found[1] for found in intervals.values() if found)]
  top = 1.0 if shares and skill["kind"] == "classification" else max(reached) or 1.0
  figure, axis = new_figure(5.0, 0.55 + 0.27 * len(rows))
  for place, (_, value, kind) in enumerate(rows):
    face, edge = {"main": (SERIES[0], "none"), "baseline": ("none", INK)}.get(kind, (SERIES[1], "none"))
    axis.barh(place, value or 0.0, color=face, edgecolor=edge, linewidth=0.8, height=0.68)
    low, high = intervals.get(rows[place][0]) or (value or 0.0, value or 0.0)
    axis.plot([low, high], [place, place], color=INK, linewidth=1.1, alpha=0.7)
    end = max(value or 0.0, high) + 0.012 * top
    axis.text(end, place, "–" if value is None else f"{value:.3f}", va="center", color=INK)
  axis.set_yticks(range(len(rows)), [row[0] for row in rows])
  axis.tick_params(axis="y", length=0)
  axis.invert_yaxis()
  axis.set_xlim(0, 1.14 * top)
  axis.xaxis.set_major_locator(_ticks(top))
  return svg(figure, f"{name}: {skill.get('metric', 'value')}")


def _ticks(top: float):
  from matplotlib.ticker import FixedLocator, MaxNLocator

  return FixedLocator([0, 0.25, 0.5, 0.75, 1.0]) if top == 1.0 else MaxNLocator(4)


def name_powers(axis) -> None:
  """Names the ticks of a logarithmic axis, as plain numbers.

  Args:
    axis: `axis.xaxis` or `axis.yaxis`, after its data are drawn.
  """
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  low, high = axis.get_view_interval()
  narrow = high / low < 30  # less than two whole powers of ten: name what lies between them, too
  axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
  axis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float):
  """Returns a figure of so many inches, and its axis."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  axis = figure.subplots()
  axis.set_facecolor("none")
  axis.tick_params(colors=INK, labelsize=8.5)
  axis.xaxis.label.set_color(INK)
  axis.yaxis.label.set_color(INK)
  for side, spine in axis.spines.items():
    spine.set_color(INK)
    spine.set_alpha(0.4)
    spine.set_visible(side in ("left", "bottom"))
  return figure, axis


def svg(figure, title: str, key: str = "") -> str:
  """Returns a figure as HTML in the page's colours.

  Args:
    figure: drawn in `INK` and `SERIES`.
    title: above it.
    key: tells it from another one of the same title in the page.
  """
  from matplotlib import rc_context

  buffer = io.StringIO()
  # No metadata: it would hold addresses and the time. Ids come from the salt: steady, and not those of another picture.
  with rc_context({"svg.hashsalt": key + title}):
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  # Groups' names repeat from picture to picture, and an id may occur once in a page; nothing refers to them.
  text = re.sub(r'<g id="[^"]*"', "<g", text).replace(INK, "currentColor")
  for number, colour in enumerate(SERIES, 1):
    text = text.replace(colour, f"var(--s{number})")
  return f'<figure role="img" aria-label="{escape(title)}"><h3>{escape(title)}</h3>{text}</figure>'
