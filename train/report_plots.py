"""The report's pictures, as SVG that takes the page's text colour and its series colours, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.report_verdict import value_of

Report = Mapping[str, Any]

_INK = "#010203"  # drawn in these colours, shown in those of the page's style sheet
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_DASHES = ("-", "--", ":")  # after the last colour, the first comes again with other dashes
_MOST_POINTS = 400  # of one curve; more cannot be seen at this size
_SETTINGS = {
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
  with rc_context(_SETTINGS):
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
  with rc_context(_SETTINGS):
    parts = [
      _task_curves(group, key, names, f"{what}: {title}")
      for title, group in groups
      if any(len(known[stage["name"]]) >= least for stage in group)
    ]
  return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _task_curves(stages: Sequence[Mapping[str, Any]], key: str, names: Sequence[str], title: str) -> str:
  figure, axis = _figure(5.4, 3.1)
  offset, labelled = 0, set()
  for number, stage in enumerate(stages):
    for place, name in enumerate(names):
      points = _thinned([(step, found[name]) for step, found in stage[key] if name in found])
      if not points:
        continue
      steps, values = zip(*points, strict=True)
      look = {"color": _SERIES[place % len(_SERIES)], "linestyle": _DASHES[place // len(_SERIES) % len(_DASHES)]}
      look |= {"linewidth": 1.5, "marker": "o", "markersize": 3.0 if len(points) < 40 else 0.0}
      places = [offset + step for step in steps]
      numbers = [math.nan if value is None else value for value in values]
      axis.plot(places, numbers, label=None if name in labelled else name, **look)
      labelled.add(name)
    best = stage.get("best")
    if key == "validation" and best:
      axis.plot([offset + best["step"]], [best["value"]], "o", color=_INK, fillstyle="none", markersize=10)
    offset += max(stage.get("steps") or 0, stage[key][-1][0])
    if number < len(stages) - 1:
      axis.axvline(offset, color=_INK, linewidth=0.7, alpha=0.45, linestyle=(0, (4, 3)))
  axis.set_xlabel("optimizer step")
  axis.set_ylim(bottom=0)
  axis.set_xlim(left=0)
  axis.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.6)
  axis.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="best")
  return _svg(figure, title)


def task_bars(report: Report) -> str:
  """Draws each task's metric for every stage, with its interval, and baseline.

  Args:
    report: see `train/report.py`.

  Returns:
    HTML with inline SVG; "" where there are no tasks.
  """
  from matplotlib import rc_context

  with rc_context(_SETTINGS):
    parts = [_bars(report, skill) for skill in report["skills"] if skill["kind"] != "perplexity"]
  return f'<div class="figures">{"".join(parts)}</div>' if any(parts) else ""


def reliability_diagram(name: str, found: Mapping[str, Any]) -> str:
  """Draws accuracy over confidence, bin by bin, before and after the temperature; a dot's area is its rows.

  Args:
    name: the task's.
    found: its "calibration", see `train/report.py`.
  """
  from matplotlib import rc_context

  with rc_context(_SETTINGS):
    figure, axis = _figure(4.2, 3.4)
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, alpha=0.45, linestyle=(0, (4, 3)))
    curves = [("temperature 1", "before", _SERIES[1])]
    curves += [(f"temperature {found['temperature']:.2f}", "after", _SERIES[0])] if found["rows"] else []
    for label, key, colour in curves:
      rows, sure, right = zip(*found["reliability"][key], strict=True)
      sizes = [12 + 120 * count / sum(rows) for count in rows]
      axis.plot(sure, right, color=colour, linewidth=1.4, label=label)
      axis.scatter(sure, right, s=sizes, color=colour, linewidths=0)
    axis.set_xlabel("probability of the label")
    axis.set_ylabel("share that is right")
    axis.set_xlim(0, 1.03)
    axis.set_ylim(0, 1.03)
    axis.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper left")
    return _svg(figure, f"{name}: reliability")


def coverage_curve(name: str, found: Mapping[str, Any]) -> str:
  """Draws the accuracy of the surest share of texts, and where the threshold lies, if there is one.

  Args:
    name: the task's.
    found: its "calibration", see `train/report.py`.
  """
  from matplotlib import rc_context

  with rc_context(_SETTINGS):
    figure, axis = _figure(4.2, 3.4)
    _, share, right = zip(*found["curve"], strict=True)
    marker = "o" if len(share) == 1 else None
    axis.plot(share, right, color=_SERIES[0], linewidth=1.7, drawstyle="steps-pre", marker=marker)
    if found["threshold"] is not None and found["accuracy"] is not None:
      axis.plot([found["coverage"]], [found["accuracy"]], "o", color=_SERIES[1], label=f"from {found['threshold']:.2f}")
      axis.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="lower left")
    axis.set_xlabel("share of texts that are labelled")
    axis.set_ylabel("share of those that is right")
    axis.set_xlim(0, 1.03)
    axis.set_ylim(min(right) - 0.05, 1.03)
    return _svg(figure, f"{name}: coverage and accuracy")


def _curve(stage: Mapping[str, Any]) -> tuple[list[float], list[float]]:
  """Returns steps and losses, thinned; a loss that is not finite leaves a gap."""
  kept = _thinned(stage.get("loss") or [])
  return [step for step, _ in kept], [math.nan if loss is None else loss for _, loss in kept]


def _thinned(points: Sequence[Any]) -> list[Any]:
  stride = math.ceil(len(points) / _MOST_POINTS) or 1
  return [*points[:-1:stride], *points[-1:]]


def _curves(stages: Sequence[Mapping[str, Any]], title: str, follow: bool) -> str:
  figure, axis = _figure(5.4, 3.1)
  offset = 0
  for number, stage in enumerate(stages):
    steps, losses = _curve(stage)
    colour, dash = _SERIES[number % len(_SERIES)], _DASHES[number // len(_SERIES) % len(_DASHES)]
    marker = "o" if len(steps) == 1 else None  # one point makes no line
    places = [offset + step for step in steps]
    axis.plot(places, losses, color=colour, linestyle=dash, label=stage["name"], linewidth=1.7, marker=marker)
    if follow:
      offset += max(stage.get("steps") or 0, steps[-1])
      if number < len(stages) - 1:
        axis.axvline(offset, color=_INK, linewidth=0.7, alpha=0.45, linestyle=(0, (4, 3)))
  axis.set_xlabel("optimizer step")
  axis.set_ylabel("nats a target token")
  axis.set_ylim(bottom=0)
  axis.set_xlim(left=0)
  axis.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.6)
  axis.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper right")
  return _svg(figure, title)


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
  top = 1.0 if shares and skill["kind"] == "classification" else max(values) or 1.0
  figure, axis = _figure(5.0, 0.55 + 0.27 * len(rows))
  for place, (_, value, kind) in enumerate(rows):
    face, edge = {"main": (_SERIES[0], "none"), "baseline": ("none", _INK)}.get(kind, (_SERIES[1], "none"))
    axis.barh(place, value or 0.0, color=face, edgecolor=edge, linewidth=0.8, height=0.68)
    low, high = intervals.get(rows[place][0]) or (value or 0.0, value or 0.0)
    axis.plot([low, high], [place, place], color=_INK, linewidth=1.1, alpha=0.7)
    end = max(value or 0.0, high) + 0.012 * top
    axis.text(end, place, "–" if value is None else f"{value:.3f}", va="center", color=_INK)
  axis.set_yticks(range(len(rows)), [row[0] for row in rows])
  axis.tick_params(axis="y", length=0)
  axis.invert_yaxis()
  axis.set_xlim(0, 1.14 * top)
  axis.xaxis.set_major_locator(_ticks(top))
  return _svg(figure, f"{name}: {skill.get('metric', 'value')}")


def _ticks(top: float):
  from matplotlib.ticker import FixedLocator, MaxNLocator

  return FixedLocator([0, 0.25, 0.5, 0.75, 1.0]) if top == 1.0 else MaxNLocator(4)


def _figure(width: float, height: float):
  """Returns a figure of so many inches, and its axis."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  axis = figure.subplots()
  axis.set_facecolor("none")
  axis.tick_params(colors=_INK, labelsize=8.5)
  axis.xaxis.label.set_color(_INK)
  axis.yaxis.label.set_color(_INK)
  for side, spine in axis.spines.items():
    spine.set_color(_INK)
    spine.set_alpha(0.4)
    spine.set_visible(side in ("left", "bottom"))
  return figure, axis


def _svg(figure, title: str) -> str:
  from matplotlib import rc_context

  buffer = io.StringIO()
  # No metadata: it would hold addresses and the time. Ids come from the salt: steady, and not those of another picture.
  with rc_context({"svg.hashsalt": title}):
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  # Groups' names repeat from picture to picture, and an id may occur once in a page; nothing refers to them.
  text = re.sub(r'<g id="[^"]*"', "<g", text).replace(_INK, "currentColor")
  for number, colour in enumerate(_SERIES, 1):
    text = text.replace(colour, f"var(--s{number})")
  return f'<figure role="img" aria-label="{escape(title)}"><h3>{escape(title)}</h3>{text}</figure>'
