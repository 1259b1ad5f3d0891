"""The report's pictures of skills over stages and over a sweep's shares; see `train/report_plots.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.report_plots import INK, SERIES, SETTINGS, look_of, mark_end, name_powers, new_figure, svg
from train.report_verdict import find_roles, value_of
from train.report_words import METRICS

Report = Mapping[str, Any]
_HATCHES = (None, "///", "...")
_SWEEPS = {
  "replay": ("replayed share", "replay"),
  "averaging": ("share of multitask's parameters", "averaging"),
}


def course(report: Report) -> str:
  """Draws each skill at the end of every stage of the main line: texts, and tasks.

  Args:
    report: see `train/report.py`.

  Returns:
    HTML with inline SVG; "" where fewer than two stages are done.
  """
  from matplotlib import rc_context

  main = [stage for stage in report["stages"] if stage.get("kind", "main") == "main"]
  groups = {"perplexity, held-out texts": [], "tasks, by their own metric": []}
  for skill in report["skills"]:
    groups[list(groups)[skill["kind"] != "perplexity"]].append(skill)
  if len(main) < 2:
    return ""
  with rc_context(SETTINGS):
    parts = [_course(report, title, main, skills) for title, skills in groups.items() if skills]
  return f'<div class="figures">{"".join(parts)}</div>' if any(parts) else ""


def shares(report: Report) -> str:
  """Draws what part of each stage's target tokens came from which task or text; "" where none is known."""
  from matplotlib import rc_context

  read = {}
  for stage in report["stages"]:
    found = report.get("mixture", {}).get(stage["name"], {})
    tokens = {name: of.get("supervised_tokens") or 0 for name, of in found.items() if name != "packing"}
    read |= {stage["name"]: tokens} if sum(tokens.values()) else {}
  if not read:
    return ""
  names = list(dict.fromkeys(name for tokens in read.values() for name in tokens))
  with rc_context(SETTINGS):
    figure, axis = new_figure(6.4, 0.8 + 0.3 * len(read))
    for number, name in enumerate(names):
      parts = [tokens.get(name, 0) / sum(tokens.values()) for tokens in read.values()]
      before = [sum(tokens.get(other, 0) for other in names[:number]) for tokens in read.values()]
      left = [count / sum(tokens.values()) for count, tokens in zip(before, read.values(), strict=True)]
      hatch = _HATCHES[number // len(SERIES) % len(_HATCHES)]  # after the last colour, the first comes again, hatched
      axis.barh(
        range(len(read)),
        parts,
        left=left,
        height=0.68,
        label=name,
        color=SERIES[number % len(SERIES)],
        hatch=hatch,
        edgecolor="none" if hatch is None else INK,
        linewidth=0,
      )
    axis.set_yticks(range(len(read)), list(read))
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the stage's target tokens")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return f'<div class="figures">{svg(figure, "Target tokens, stage by stage")}</div>'


def sweeps(report: Report) -> str:
  """Draws every skill over the shares of each sweep among the arms; "" where there is none."""
  from matplotlib import rc_context

  parts = []
  with rc_context(SETTINGS):
    for name, (axis, title) in _SWEEPS.items():
      points = _points(report, name)
      drawn = [_sweep(report, skill, points, axis, title) for skill in report["skills"]] if points else []
      parts.append(f'<h3>{title.capitalize()}</h3><div class="figures small">{"".join(drawn)}</div>' if drawn else "")
  return "".join(parts)


def _points(report: Report, name: str) -> list[tuple[float, str]]:
  """Returns (share, stage) of a sweep; an average's ends are the stages themselves."""
  arms = [stage for stage in report["stages"] if (stage.get("sweep") or {}).get("of") == name]
  points = [(stage["sweep"]["share"], stage["name"]) for stage in arms]
  if points and name == "averaging":
    points += [(0.0, arms[0]["sweep"]["with"]), (1.0, arms[0]["init_from"])]
  return sorted(points)


def _course(report: Report, title: str, main: Sequence[Mapping[str, Any]], skills: Sequence[Mapping[str, Any]]) -> str:
  figure, axis = new_figure(5.4, 3.1)
  ends, reached = [], 0
  for stage in main:
    reached += stage.get("steps") or 0
    ends.append(reached)
  places = ends if reached else list(range(len(main)))
  for number, skill in enumerate(skills):
    known = [(at, s["name"]) for at, s in zip(places, main, strict=True) if _known(report, s["name"], skill)]
    if known:
      _draw(axis, report, skill, known, look_of(number))
  if not axis.lines:
    return ""
  for at, stage in zip(places, main, strict=True):
    mark_end(axis, at)
    axis.annotate(
      stage["name"],
      (at, 1.0),
      xycoords=("data", "axes fraction"),
      xytext=(0, 3),
      color=INK,
      fontsize=8,
      textcoords="offset points",
      ha="right" if at == places[-1] else "center",
    )
  axis.set_xlabel("optimizer step")
  if skills[0]["kind"] == "perplexity":
    axis.set_yscale("log")
    name_powers(axis.yaxis)
  else:
    axis.set_ylim(0, 1.06 * axis.get_ylim()[1])  # what is at the top is not cut
  axis.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
  axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
  return svg(figure, title)


def _sweep(report: Report, skill: Mapping[str, Any], points: Sequence[tuple[float, str]], label: str, of: str) -> str:
  known = [(share, stage) for share, stage in points if _known(report, stage, skill)]
  if not known:
    return ""
  figure, axis = new_figure(3.4, 2.5)
  one = value_of(report, find_roles(report).multitask, skill["name"])
  if one is not None:
    axis.axhline(one, color=SERIES[1], linewidth=1.1, linestyle=(0, (4, 3)))
  _draw(axis, report, skill, known, look_of(0))
  axis.set_xlabel(label)
  if skill["kind"] == "perplexity":
    axis.set_yscale("log")
    name_powers(axis.yaxis)
  else:
    axis.set_ylim(0, 1.06 * axis.get_ylim()[1])  # what is at the top is not cut
  axis.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
  metric = str(skill.get("metric", skill["kind"]))
  return svg(figure, f"{skill['name']}: {METRICS.get(metric, metric)}", key=of)


def _known(report: Report, stage: str, skill: Mapping[str, Any]) -> bool:
  value = value_of(report, stage, skill["name"])
  return value is not None and (value > 0 or skill["kind"] != "perplexity")


def _draw(axis, report, skill, known, look) -> None:
  """Draws a skill's values, with their intervals, at (place, stage)."""
  places, stages = zip(*known, strict=True)
  values = [value_of(report, stage, skill["name"]) for stage in stages]
  axis.plot(places, values, linewidth=1.7, marker="o", markersize=4, label=skill["name"], **look)
  for place, stage in known:
    interval = report["matrix"][stage][skill["name"]].get("interval")
    if interval and None not in interval:
      axis.plot([place, place], interval, color=look["color"], linewidth=1.1)
