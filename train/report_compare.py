"""The comparison of runs as one HTML file, in the look of a run's own report."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.gate import outcome
from train.report_parts import document, name_of, pieces, section, table, when
from train.report_plots import INK, SERIES, SETTINGS, name_powers, new_figure, svg
from train.report_retention import change_cell
from train.report_verdict import number
from train.report_words import AGAINST, METRICS

Comparison = Mapping[str, Any]
_LONGEST_VALUE = 120  # characters of a setting that are shown


def render(comparison: Comparison) -> str:
  """Returns the comparison as an HTML document.

  Args:
    comparison: from `compare.compare_runs`; numbers finite or None.
  """
  names = [run["name"] for run in comparison["runs"]]
  note = f"Stage by stage against {escape(names[0])}, on the same test rows: the difference, its 95 % paired bootstrap "
  note += "interval, and p of a paired permutation test, not corrected for the number of comparisons. Bold: the best."
  sections = [section("The runs", runs_table(comparison), "")]
  sections += [section(_title(skill), skill_part(comparison, skill), note) for skill in comparison["skills"]]
  said = "Of the stages that all runs have. Where runs keep their files is left out."
  sections.append(section("Settings that differ", settings_table(comparison), said))
  header = f'<header><p class="kicker">Comparison of runs</p><h1>{" · ".join(map(name_of, names))}</h1></header>'
  footer = "Every number on this page is in compare.json, beside it."
  return document(f"Comparison: {', '.join(names)}", header, sections, footer)


def runs_table(comparison: Comparison) -> str:
  """Returns one row a run, and below it why what is not tested is not."""
  rows, notes = "", ""
  for run in comparison["runs"]:
    size = f"{run['parameters']:,}" if run.get("parameters") else "–"
    gate = "–" if run.get("gate") is None else outcome(run["gate"]).lower()
    look = {True: "gained", False: "forgotten"}.get(run.get("gate"), "")
    named = escape(" ".join(str(run[key]) for key in ("architecture", "size") if run.get(key)))
    cells = f"<td>{escape(str(run.get('domain') or '–'))}</td><td>{named}</td><td>{size}</td>"
    cells += f"<td>{when(run.get('created'))}</td>"
    rows += f'<tr><th>{name_of(run["name"])}</th>{cells}<td class="{look}">{gate}</td></tr>'
  for run, found in comparison["unlike"].items():
    for why in dict.fromkeys(found.values()):
      skills = ", ".join(escape(skill) for skill, reason in found.items() if reason == why)
      notes += f"<li>Not tested for {escape(run)}: <b>{skills}</b>: {escape(why)}.</li>"
  heads = ["run", "domain", "model", "parameters", "made", "gate"]
  return table(heads, rows) + (f'<ul class="note">{notes}</ul>' if notes else "")


def skill_part(comparison: Comparison, skill: Mapping[str, Any]) -> str:
  """Returns the table stage x run of a skill, and its picture."""
  names, body = [run["name"] for run in comparison["runs"]], ""
  best = max if skill.get("higher_is_better", skill["kind"] != "perplexity") else min
  for stage in comparison["stages"]:
    values = comparison["values"][stage][skill["name"]]
    alike = [name for name in names if skill["name"] not in comparison["unlike"].get(name, {})]
    known = [values[name]["value"] for name in alike if values.get(name, {}).get("value") is not None]
    cells = ""
    for name in names:
      entry = values.get(name, {})
      value = entry.get("value")
      bold = ' class="best"' if len(known) > 1 and name in alike and value == best(known) else ""
      cells += f"<td{bold}>{number(value)}<small>{_aside(entry)}</small></td>"
      if name != names[0]:
        cells += change_cell(comparison["changes"][name].get(stage, {}).get(skill["name"]), skill, AGAINST)
    body += f"<tr><th>{name_of(stage)}</th>{cells}</tr>" if values else ""
  heads = ["stage", name_of(names[0])]
  for name in names[1:]:
    heads += [name_of(name), f"against {name_of(names[0])}"]
  return table(heads, body) + _picture(comparison, skill, names)


def settings_table(comparison: Comparison) -> str:
  """Returns one row for each setting that differs."""
  names, body = [run["name"] for run in comparison["runs"]], ""
  for row in comparison["settings"]:
    values = [row["values"][name] for name in names]
    shown = ["–" if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    cells = "".join(f'<td class="left wrap">{escape(text[:_LONGEST_VALUE])}</td>' for text in shown)
    stages = ", ".join(map(name_of, row["stages"]))
    body += f'<tr><th>{name_of(row["key"])}</th><td class="left wrap">{stages}</td>{cells}</tr>'
  if not body:
    return "<p>None: the runs differ in nothing that the configs hold.</p>"
  return table(["setting", "stages", *map(name_of, names)], body)


def _title(skill: Mapping[str, Any]) -> str:
  metric = str(skill.get("metric", skill["kind"]))
  return f"{name_of(skill['name'])}: {escape(METRICS.get(metric, metric))}"


def _aside(entry: Mapping[str, Any]) -> str:
  low, high = entry.get("interval") or (None, None)
  shown = [] if None in (low, high) else [f"{number(low)} to {number(high)}"]
  shown += [f"{entry['bits_per_byte']:.2f} bits a byte"] if entry.get("bits_per_byte") is not None else []
  return pieces(shown)


def _picture(comparison: Comparison, skill: Mapping[str, Any], names: Sequence[str]) -> str:
  """Draws each run's values and intervals, stage below stage."""
  from matplotlib import rc_context

  stages = [stage for stage in comparison["stages"] if comparison["values"][stage][skill["name"]]]
  with rc_context(SETTINGS):
    figure, axis = new_figure(6.4, 0.8 + (0.22 + 0.16 * len(names)) * len(stages))
    for order, name in enumerate(names):
      colour, points = SERIES[order % len(SERIES)], []
      for place, stage in enumerate(stages):
        entry = comparison["values"][stage][skill["name"]].get(name, {})
        if entry.get("value") is None:
          continue
        at = place + 0.7 * ((order + 0.5) / len(names) - 0.5)
        points.append((entry["value"], at))
        if entry.get("interval") and None not in entry["interval"]:
          axis.plot(entry["interval"], [at, at], color=colour, linewidth=1.4)
      if points:
        axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=4.5, label=name)
    axis.set_yticks(range(len(stages)), stages)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(stages) - 0.5, -0.5)
    if skill["kind"] == "perplexity":
      axis.set_xscale("log")
      name_powers(axis.xaxis)
    axis.grid(axis="x", color=INK, alpha=0.1, linewidth=0.6)
    for place in range(1, len(stages)):
      axis.axhline(place - 0.5, color=INK, alpha=0.12, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return f'<div class="figures">{svg(figure, skill["name"], key="compare")}</div>'
