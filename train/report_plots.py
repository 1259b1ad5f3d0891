"""The report's plots, as SVG that takes the page's text colour."""

import io
from collections.abc import Mapping
from typing import Any

_INK = "#010203"  # drawn in this colour, shown in the page's (light or dark)
# Okabe & Ito's palette: told apart with any colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")


def loss_curves(report: Mapping[str, Any]) -> str:
  """Draws training loss over steps: the main line's stages one after the other, then the arms."""
  stages = [stage for stage in report["stages"] if stage.get("loss")]
  if not stages:
    return ""
  main = [stage for stage in stages if stage["kind"] == "main"]
  arms = [stage for stage in stages if stage["kind"] != "main"]
  groups = [group for group in (main, arms) if group]
  figure, axes = _figure(9.6, 3.2, len(groups))
  for axis, group in zip(axes, groups, strict=True):
    offset = 0
    for number, stage in enumerate(group):
      steps, losses = zip(*stage["loss"], strict=True)
      axis.plot([offset + step for step in steps], losses, color=_COLOURS[number], label=stage["name"], linewidth=1.6)
      if group is main:
        offset += stage["steps"]
        axis.axvline(offset, color=_INK, linewidth=0.6, alpha=0.4)
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
  return _svg(figure, "Training loss of every stage")


def task_bars(report: Mapping[str, Any]) -> str:
  """Draws each task's metric for every stage, with the best baseline as a line."""
  tasks = [skill for skill in report["skills"] if skill["kind"] != "perplexity"]
  if not tasks:
    return ""
  parts = []
  for task in tasks:
    names = [stage["name"] for stage in report["stages"]]
    values = [report["matrix"][name][task["name"]]["value"] for name in names]
    figure, (axis,) = _figure(4.6, 0.5 + 0.34 * len(names), 1)
    colours = [_COLOURS[0] if stage["kind"] == "main" else _COLOURS[6] for stage in report["stages"]]
    axis.barh(range(len(names)), values, color=colours, height=0.66)
    for row, value in enumerate(values):
      axis.text(min(value, 1.0) + 0.01, row, f"{value:.3f}", va="center", fontsize=8, color=_INK)
    baselines = report.get("baselines", {}).get(task["name"], {}).values()
    if baselines:
      axis.axvline(max(found["value"] for found in baselines), color=_INK, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15)
    axis.set_title(task["name"], fontsize=10, color=_INK, loc="left")
    parts.append(_svg(figure, f"{task['name']} by stage"))
  return f'<div class="figures">{"".join(parts)}</div>'


def _figure(width: float, height: float, columns: int):
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(1, columns, squeeze=False)[0]
  for axis in axes:
    axis.set_facecolor("none")
    axis.tick_params(colors=_INK, labelsize=8)
    axis.xaxis.label.set_color(_INK)
    for name, spine in axis.spines.items():
      spine.set_color(_INK)
      spine.set_alpha(0.4)
      spine.set_visible(name in ("left", "bottom"))
  return figure, axes


def _svg(figure, label: str) -> str:
  import matplotlib

  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": label}):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :].replace(_INK, "currentColor")
  return f'<figure role="img" aria-label="{label}">{text}</figure>'
