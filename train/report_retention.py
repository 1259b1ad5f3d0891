"""The report's part on what was gained, kept and forgotten: the gate, the changes, what is left of the best."""

from collections.abc import Mapping
from html import escape
from typing import Any

from train.gate import outcome
from train.report_parts import kind_of, name_of, table
from train.report_verdict import find_roles, p_value, percent

Report = Mapping[str, Any]
_SIGNS = {"gained": "▲", "forgotten": "▼", "kept": "="}
_MOST_SHADE = 0.5  # opacity of a cell that has nothing left, or twice as much


def gate_box(report: Report) -> str:
  """Returns the gate's verdict and every rule's; "" where there is no gate."""
  gate = report.get("gate")
  if not gate:
    return ""
  rows = ""
  for name, rule in gate["rules"].items():
    for place, check in enumerate(rule["checks"]):
      sign = {True: "✓", False: "✗", None: "…"}[check["passed"]]
      word, several = outcome(check["passed"]), len(rule["checks"])
      first = f'<th rowspan="{several}">{name_of(name)}</th>' if place == 0 else ""
      rows += f'<tr>{first}<td class="mark {word.lower()}">{sign} {word.lower()}</td>'
      rows += f'<td class="left">{escape(check["said"])}</td></tr>'
  word = outcome(gate["passed"])
  met = sum(rule["passed"] is True for rule in gate["rules"].values())
  said = f"{met} of {len(gate['rules'])} rules are met"
  head = f'<p class="outcome"><b>Gate {word.lower()}</b> {said}</p>'
  return f'<section class="gate {word.lower()}">{head}<div class="scroll"><table>{rows}</table></div></section>'


def changes_table(report: Report, changes: Mapping[str, Any], words: Mapping[str, str]) -> str:
  """Returns the table of what each stage gained and forgot.

  Args:
    report: see `train/report.py`; where `changes` are its "changes", "earlier" adds rows to main stages.
    changes: the report's "changes" or "arms".
    words: for verdicts; those that it lacks stay as they are.
  """
  own = changes is report.get("changes")
  earlier, one, rows = report.get("earlier", {}) if own else {}, find_roles(report).multitask, []
  for stage in report["stages"]:
    name, arm = stage["name"], kind_of(stage) == "arm"
    if own and arm and stage.get("init_from") == one:
      continue  # the table of the arms against the one model has it
    further = () if arm else earlier.get(name, {}).values()  # of arms: in report.json
    several = [found for found in (changes.get(name), *further) if found]
    for place, found in enumerate(several):
      cells = "".join(change_cell(found.get(skill["name"]), skill, words) for skill in report["skills"])
      source = f"<small>against {escape(str(next(iter(found.values()))['from']))}</small>"
      look = f"{kind_of(stage)}{' further' if place else ''}"
      rows.append(f'<tr class="{look}"><th>{name_of(name) if not place else ""}{source}</th>{cells}</tr>')
  return table(["stage", *(name_of(skill["name"]) for skill in report["skills"])], "".join(rows))


def change_cell(change: Mapping[str, Any] | None, skill: Mapping[str, Any], words: Mapping[str, str]) -> str:
  """Returns a table's cell with a change's size, test and verdict; `words`: see `changes_table`."""
  if not change:
    return '<td class="cannot">–</td>'
  verdict = change["verdict"]
  look = escape(verdict.split()[0])
  shown = f'<td class="{look}">{size_of(change, skill)}{tested(change, skill)}'
  return f"{shown}<small>{_SIGNS.get(verdict, '?')} {escape(words.get(verdict, verdict))}</small></td>"


def retention_table(report: Report) -> str:
  """Returns the heat map of what is left of the best earlier stage, with the mean backward transfer."""
  kept, transfer, rows = report.get("retention", {}), report.get("transfer", {}), ""
  groups = [name for name in ("texts", "tasks") if any(name in found for found in transfer.values())]
  for stage in report["stages"]:
    found = kept.get(stage["name"])
    if not found:
      continue
    cells = "".join(_left(found.get(skill["name"])) for skill in report["skills"])
    for name in groups:
      value = transfer.get(stage["name"], {}).get(name, {}).get("backward")
      look = "" if value is None else "forgotten" if value < 0 else "gained" if value > 0 else "kept"
      shown = "–" if value is None else f"{value:+.3f}".replace("-", "−")
      cells += f'<td class="{look}">{shown}</td>'
    rows += f'<tr class="{kind_of(stage)}"><th>{name_of(stage["name"])}</th>{cells}</tr>'
  units = {"texts": "nats a token", "tasks": "points"}
  means = [f"backward transfer<small>{name}, {units[name]}</small>" for name in groups]
  return table(["stage", *(name_of(skill["name"]) for skill in report["skills"]), *means], rows, "wide heat")


def _left(found: Mapping[str, Any] | None) -> str:
  if not found or found["share"] is None:
    return "<td>–</td>"
  share = found["share"]
  tone = "loss" if share < 1 else "gain"
  opacity = _MOST_SHADE * min(abs(share - 1), 1.0)
  shown = f"×{share:,.0f}" if share >= 10 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
  source = f"<small>of {escape(found['best'])}</small>"
  return f'<td style="background:rgba(var(--{tone}),{opacity:.2f})">{shown.replace("%", " %")}{source}</td>'


def size_of(change: Mapping[str, Any], skill: Mapping[str, Any]) -> str:
  """Returns how large a change is: of a perplexity in percent, of anything else in its unit."""
  if change.get("absolute") is None:
    return "not finite"
  if skill["kind"] == "perplexity" and change.get("relative") is not None:
    return percent(change["relative"])
  shown = f"{change['absolute']:+.3f}".replace("-", "−")
  return "0.000" if shown[1:] == "0.000" else shown


def tested(change: Mapping[str, Any], skill: Mapping[str, Any]) -> str:
  """Returns a change's interval, in the form of its size, its p-value and examples; "" where there are none."""
  if change.get("p") is None:
    return ""
  if skill["kind"] == "perplexity":
    low, high = percent(change["low"]), percent(change["high"])
  else:
    low, high = (size_of({**change, "absolute": change[end]}, skill) for end in ("low", "high"))
  count = f", n {change['n']:,}" if change.get("n") else ""
  return f"<small>{low} to {high}</small><small>{escape(p_value(change['p']))}{count}</small>"


def learned_words(report: Report) -> str:
  """Says which stage learned each skill that counts in the backward transfer; "" where none does."""
  learned = {
    name: skill["learned"]
    for means in report.get("transfer", {}).values()
    for found in means.values()
    for name, skill in found["skills"].items()
  }
  said = ", ".join(f"{name_of(name)} ({escape(stage)})" for name, stage in learned.items())
  return f"Learned at: {said}." if said else ""
