"""The report as one HTML file: no network, light and dark, readable on a phone and in print."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.calibration import LABEL_SCORES
from train.metrics import DECODING
from train.report_course import course, shares, sweeps
from train.report_labels import calibrations, confusions, label_sets
from train.report_parts import document, group, kind_of, name_of, pieces, section, table, when
from train.report_plots import loss_curves, task_bars, task_curves
from train.report_retention import changes_table, gate_box, learned_words, retention_table
from train.report_verdict import number, rows_of, value_of, verdict
from train.report_words import AGAINST, METRICS, NOTES, TITLES
from train.text_metrics import GENERATION

Report = Mapping[str, Any]

_LONGEST_TEXT = 900  # characters of a sample that are shown; what is cut is counted
_SETS = ("subset_accuracy", "hamming_loss")  # of several labels a text
_MANY_PASSES = 64  # repeating a text oftener than this costs quality (T5, section 3.4.3)


def render(report: Report) -> str:
  """Returns the report as an HTML document.

  Args:
    report: see `train/report.py`, with "changes"; numbers finite or None.
  """
  bodies = {
    "matrix": matrix_table(report),
    "retention": retention_table(report),
    "changes": changes_table(report, report.get("changes", {}), {}),
    "arms": changes_table(report, report.get("arms", {}), AGAINST),
    "sweeps": sweeps(report),
    "course": course(report),
    "bars": task_bars(report),
    "metrics": metrics_tables(report),
    "losses": loss_curves(report) + task_curves(report, "task_loss", "Loss of each source"),
    "validation": task_curves(report, "validation", "Validation", least=1),
    "gradients": task_curves(report, "task_gradients", "Share of the gradient's norm"),
    "samples": samples(report),
    "calibrations": calibrations(report),
    "confusions": confusions(report),
    "sets": label_sets(report),
    "mixture": shares(report) + mixture_table(report),
    "facts": facts_table(report),
  }
  notes = {**NOTES, "retention": f"{NOTES['retention']} {learned_words(report)}"}
  sections = [section(title, bodies[name], notes[name]) for name, title in TITLES.items()]
  title = f"{report.get('domain', 'Report')}: {_about(report)}"
  return document(title, _header(report), sections, "Every number on this page is in report.json, beside it.")


def matrix_table(report: Report) -> str:
  """Returns the table stage x skill, arms and baselines apart; shaded by column, the best stage bold."""
  skills, stages = report["skills"], report["stages"]
  columns = {s["name"]: [value_of(report, stage["name"], s["name"]) for stage in stages] for s in skills}
  groups: dict[str, list[str]] = {"main": [], "arm": []}
  for stage in stages:
    cells = ""
    for skill in skills:
      entry = report.get("matrix", {}).get(stage["name"], {}).get(skill["name"], {})
      good = _goodness(entry.get("value"), columns[skill["name"]], skill)
      shown = f"{number(entry.get('value'))}<small>{_aside(entry)}</small>"
      best = ' class="best"' if good == 1 else ""
      cells += (
        f"<td>{shown}</td>"
        if good is None
        else (f'<td{best} style="background:rgba(var(--shade),{0.42 * good:.2f})">{shown}</td>')
      )
    kind = kind_of(stage)
    groups[kind].append(f'<tr class="{kind}"><th>{name_of(stage["name"])}</th>{cells}</tr>')
  body = "".join(groups["main"]) + group("Comparison arms", groups["arm"], len(skills))
  body += group("Without a language model", _baseline_rows(report), len(skills))
  heads = []
  for skill in skills:
    counts = " or ".join(f"{count:,}" for count in rows_of(report, skill["name"]))
    unit = "tokens" if skill["kind"] == "perplexity" else "rows"
    size = f"<small>{counts} {unit}</small>" if counts else ""
    heads.append(f"{name_of(skill['name'])}<small>{escape(_metric(skill))}</small>{size}")
  return table(["stage", *heads], body)


def metrics_tables(report: Report) -> str:
  """Returns for each task a table of its further metrics, stage by stage and of the baselines."""
  parts = []
  for skill in report["skills"]:
    rows = [(s["name"], kind_of(s), report.get("matrix", {}).get(s["name"], {})) for s in report["stages"]]
    found = [(name, kind, _further(row.get(skill["name"], {}))) for name, kind, row in rows]
    baselines = report.get("baselines", {}).get(skill["name"], {})
    found += [(name.replace("_", " "), "baseline", _further(baselines[name])) for name in sorted(baselines)]
    heads = list(dict.fromkeys(key for _, _, values in found for key in values))
    body = "".join(
      f'<tr class="{kind}"><th>{name_of(name)}</th>'
      f"{''.join(f'<td>{number(values.get(key))}</td>' for key in heads)}</tr>"
      for name, kind, values in found
      if values
    )
    if len(heads) > 1 and skill["kind"] != "perplexity":
      shown = table(["stage", *(escape(METRICS.get(key, key.replace("_", " "))) for key in heads)], body)
      parts.append(f"<details{'' if parts else ' open'}><summary>{escape(skill['name'])}</summary>{shown}</details>")
  return "".join(parts)


def _further(entry: Mapping[str, Any]) -> dict[str, float]:
  """Returns a task's metrics that are one number each, by the names of their columns."""
  found = {name: entry.get(name) for name in (*GENERATION, *DECODING, "micro_f1", "macro_f1", *_SETS)}
  groups = [
    ("accuracies", "accuracy by {}", LABEL_SCORES),
    ("generated", "free answers, {}", ("valid", "accuracy", "micro_f1", *_SETS[:1])),
  ]
  for key, title, names in groups:
    found |= {title.format(name): entry.get(key, {}).get(name) for name in names}
  errors = entry.get("calibration", {}).get("ece", {})
  found |= {f"ECE {name}": errors.get(name) for name in ("before", "after")}
  return {name: value for name, value in found.items() if value is not None}


def samples(report: Report) -> str:
  """Returns sample rows with every stage's answer beside the others."""
  kinds = {stage["name"]: kind_of(stage) for stage in report["stages"]}
  skills = {skill["name"]: skill["kind"] for skill in report["skills"]}
  parts, shown = [], set()
  for task in sorted(report.get("samples", {}), key=lambda name: list(skills).index(name) if name in skills else 999):
    labels = skills.get(task) in ("classification", "multi_label")
    cards = ""
    for row in report["samples"][task]:
      outputs, target = row.get("outputs", {}), str(row.get("target", ""))
      answers = ""
      for stage in [*(name for name in kinds if name in outputs), *(name for name in outputs if name not in kinds)]:
        text = str(outputs[stage])
        right = text.strip() == target.strip()
        mark = ("✓ " if right else "✗ ") if labels else ""
        look = f' class="{"right" if right else "wrong"}"' if labels else ""
        heading = f'<h4 class="{kinds.get(stage, "arm")}">{name_of(stage)}</h4>'
        answers += f"<div>{heading}<p{look}>{mark}{_cut(text)}</p></div>"
      given = f"<div><h4>input</h4><p>{_cut(str(row.get('input', '')))}</p></div>"
      given += f"<div><h4>right answer</h4><p>{_cut(target)}</p></div>"
      width = "answers short" if labels else "answers"
      cards += f'<div class="sample"><div class="given">{given}</div><div class="{width}">{answers}</div></div>'
    opened = "" if skills.get(task) in shown else " open"  # one task of each kind; the page stays short
    shown.add(skills.get(task))
    parts.append(f"<details{opened}><summary>{escape(task)}</summary>{cards}</details>" if cards else "")
  return "".join(parts)


def mixture_table(report: Report) -> str:
  """Returns what each stage read: asked and achieved shares, passes over each source, what was left out."""
  mixture, body = report.get("mixture", {}), ""
  for stage in (stage["name"] for stage in report["stages"]):
    sources = {name: found for name, found in mixture.get(stage, {}).items() if name != "packing"}
    asked, drawn, tokens = (
      sum(found.get(key) or 0 for found in sources.values()) for key in ("asked", "examples", "supervised_tokens")
    )
    rows = []
    for name, found in sources.items():
      passes = found.get("passes")
      many = ' class="forgotten"' if (passes or 0) > _MANY_PASSES else ""
      cells = [_share(found.get("asked"), asked), _share(found.get("examples"), drawn), _whole(found.get("examples"))]
      cells += [_share(found.get("supervised_tokens"), tokens), _whole(found.get("supervised_tokens"))]
      left_out = [f"{found[key]:,} {key}" for key in ("truncated", "skipped") if found.get(key)]
      rows.append(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f"<td{many}>{'–' if passes is None else f'{passes:.2f}'}</td><td>{', '.join(left_out) or 'none'}</td></tr>"
      )
    body += group(stage, rows, 7, "group stage")
  return table(["source", "asked", "drawn", "examples", "target share", "target tokens", "passes", "left out"], body)


def facts_table(report: Report) -> str:
  """Returns one row of figures a stage."""
  body = ""
  for stage in report["stages"]:
    tokens, seconds, best = stage.get("tokens"), stage.get("seconds"), stage.get("best")
    losses = [loss for _, loss in stage.get("loss") or [] if loss is not None]
    packing = report.get("mixture", {}).get(stage["name"], {}).get("packing", {}).get("efficiency")
    cells = [
      escape(str(stage.get("init_from") or "–")),
      _whole(stage.get("steps")) + (f"<small>the best: {_whole(best['step'])}</small>" if best else ""),
      _whole(tokens),
      _duration(seconds),
      _whole(round(tokens / seconds)) if tokens and seconds else "–",
      f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "–",
      "–" if packing is None else f"{packing:.0%}",
    ]
    body += (
      f'<tr class="{kind_of(stage)}"><th>{name_of(stage["name"])}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
    )
  return table(["stage", "from", "steps", "tokens", "time", "tokens a second", "loss", "rows filled"], body)


def _header(report: Report) -> str:
  boxes: dict[str, list[str]] = {"main": [], "arm": []}
  for stage in report["stages"]:
    kind, start = kind_of(stage), stage.get("init_from")
    work = _work(stage)
    origin = f"<small>from {escape(str(start))}</small>" if start and kind == "arm" else ""
    shown = f"<small>{work}</small><small>{_duration(stage.get('seconds'))}</small>"
    name = name_of(stage["name"])
    boxes[kind].append(f"<li><b>{name}</b>{origin}{shown}</li>")
  flow = f'<ol class="flow">{"".join(boxes["main"])}</ol>'
  if boxes["arm"]:
    flow += f'<p class="note">Beside the main line, to compare:</p><ol class="flow arms">{"".join(boxes["arm"])}</ol>'
  said = "".join(f"<p>{escape(line)}</p>" for line in verdict(report))
  made = when(report["created"]) if report.get("created") else ""
  return (
    f'<header><p class="kicker">Domain report</p><h1>{escape(str(report.get("domain", "Report")))}</h1>'
    f'<p class="note">{" · ".join(part for part in (escape(_about(report)), made) if part)}</p>'
    f'{gate_box(report)}<div class="lead">{said}</div>{flow}</header>'
  )


def _work(stage: Mapping[str, Any]) -> str:
  sweep = stage.get("sweep") or {}
  if sweep.get("of") == "averaging":
    return f"{sweep['share']:g} of its parameters, {1 - sweep['share']:g} of {escape(sweep['with'])}'s"
  return f"{_whole(stage.get('steps'))} steps, {_short(stage.get('tokens'))} tokens"


def _about(report: Report) -> str:
  named = " ".join(str(report[key]) for key in ("architecture", "size") if report.get(key))
  parameters = report.get("parameters")
  return ", ".join(part for part in (named, f"{_short(parameters)} parameters" if parameters else "") if part)


def _baseline_rows(report: Report) -> list[str]:
  baselines, rows = report.get("baselines", {}), []
  for name in sorted({name for found in baselines.values() for name in found}):
    cells = ""
    for skill in report["skills"]:
      found = baselines.get(skill["name"], {}).get(name)
      if not found:
        cells += "<td>–</td>"
        continue
      count, counts = found.get("n"), rows_of(report, skill["name"])
      other = f"<small>on {count:,} rows</small>" if count and counts and counts != [count] else ""
      cells += f"<td>{number(found.get('value'))}<small>{_aside(found)}</small>{other}</td>"
    rows.append(f'<tr class="baseline"><th>{escape(name.replace("_", " "))}</th>{cells}</tr>')
  return rows


def _goodness(value: float | None, column: Sequence[float | None], skill: Mapping[str, Any]) -> float | None:
  """Returns the place of a value in its column, 0 (worst) to 1 (best); perplexities by their logarithm."""
  known = [other for other in column if other is not None]
  if value is None or not known:
    return None
  if skill["kind"] == "perplexity" and min(known) > 0:
    value, known = math.log(value), [math.log(other) for other in known]
  low, high = min(known), max(known)
  share = (value - low) / (high - low) if high > low else 1.0
  return share if skill.get("higher_is_better", skill["kind"] != "perplexity") or high == low else 1.0 - share


def _aside(entry: Mapping[str, Any]) -> str:
  forms = {"bits_per_byte": "{:.2f} bits a byte", "macro_f1": "macro-F1 {:.3f}", "rouge1": "ROUGE-1 {:.3f}"}
  low, high = entry.get("interval") or (None, None)
  shown = [] if None in (low, high) else [f"{number(low)} to {number(high)}"]
  shown += [form.format(entry[key]) for key, form in forms.items() if entry.get(key) is not None][:1]
  if skipped := entry.get("skipped"):
    shown.append(f"{sum(skipped.values()):,} rows skipped")
  if each := entry.get("templates"):
    shown.append(f"{min(each):.3f} to {max(each):.3f} by template")
  return pieces(shown)


def _metric(skill: Mapping[str, Any]) -> str:
  metric = str(skill.get("metric", skill["kind"]))
  return METRICS.get(metric, metric)


def _cut(text: str) -> str:
  if not text.strip():
    return '<span class="note">(nothing)</span>'
  more = len(text) - _LONGEST_TEXT
  return escape(text) if more <= 0 else f"{escape(text[:_LONGEST_TEXT])}… <em>({more:,} more characters)</em>"


def _share(part: float | None, whole: float) -> str:
  return "–" if part is None or not whole else f"{part / whole:.1%}"


def _whole(count: float | None) -> str:
  return "–" if count is None else f"{count:,}"


def _short(count: float | None) -> str:
  for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if (count or 0) >= size:
      return f"{count / size:.1f} {unit}"
  return _whole(count)


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return "–"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
