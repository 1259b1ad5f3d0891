"""The report's part on labels: how far their probabilities can be trusted, and which are confused."""

from collections.abc import Mapping
from html import escape
from typing import Any

from train.report_parts import table
from train.report_plots import coverage_curve, reliability_diagram
from train.report_verdict import find_roles, number

Report = Mapping[str, Any]


def calibrations(report: Report) -> str:
  """Returns the reliability and coverage of the one model's labels (or of the last stage's), task by task."""
  parts = []
  for skill, entry in _entries(report):
    found = entry.get("calibration")
    if not found:
      continue
    drawn = reliability_diagram(skill["name"], found) + coverage_curve(skill["name"], found)
    said = escape(" ".join(sentences(found)))
    parts.append(f'<p class="note">{escape(skill["name"])}: {said}</p><div class="figures">{drawn}</div>')
  return "".join(parts)


def sentences(found: Mapping[str, Any]) -> list[str]:
  """Says how labels were calibrated, and what that did.

  Args:
    found: a task's "calibration", see `train/report.py`.
  """
  ece = found["ece"]
  if found["rows"]:
    said = f"temperature {number(found['temperature'])}, from {found['rows']:,} validation rows"
  else:
    said = "temperature 1, not fitted"
  lines = [f"{said}; expected calibration error {number(ece['before'])} before, {number(ece['after'])} after."]
  if found["note"]:
    lines.append(f"{found['note'][:1].upper()}{found['note'][1:]}.")
  if found["threshold"] == 0:
    lines.append(f"An accuracy of {number(found['target_accuracy'])} is reached on validation without abstaining.")
  elif found["threshold"] is not None:
    asked, threshold = number(found["target_accuracy"]), number(found["threshold"])
    right = "none is" if found["accuracy"] is None else f"{number(found['accuracy'])} of them are"
    lines.append(
      f"Asked for an accuracy of {asked}, the model abstains below a probability of {threshold}: it labels "
      f"{found['coverage']:.0%} of the test rows, and {right} right."
    )
  return lines


def confusions(report: Report) -> str:
  """Returns the confusion tables of the one model (or of the last stage, where there is none yet)."""
  stage, parts = _stage(report), []
  for skill, entry in _entries(report):
    counts = entry.get("confusion")
    if not counts:
      continue
    labels = [str(label) for label in skill.get("labels") or range(1, len(counts) + 1)]
    body = ""
    for place, (label, row) in enumerate(zip(labels, counts, strict=True)):
      total = sum(row)
      cells = "".join(
        f'<td{" class=hit" if column == place else ""} style="background:rgba(var(--shade),'
        f'{0.55 * count / max(total, 1):.2f})">{f"{round(count, 1):.15g}" if count else "·"}</td>'
        for column, count in enumerate(row)
      )
      per_class = (entry.get("per_class") or {}).get(label, {})
      recall = f"{row[place] / total:.0%}" if total else "–"
      precision, f1 = (f"{per_class[key]:.0%}" if key in per_class else "–" for key in ("precision", "f1"))
      body += f"<tr><th>{escape(label)}</th>{cells}<td>{round(total, 1):.15g}</td><td>{recall}</td><td>{precision}</td>"
      body += f"<td>{f1}</td></tr>"
    turned = ' class="turned"' if len(labels) > 5 else ""
    head = "".join(f"<th{turned}><span>{escape(label)}</span></th>" for label in labels)
    made = f'<table class="confusion"><thead><tr><th></th>{head}<th>rows</th>'
    made += "<th>recall</th><th>precision</th><th>F1</th></tr></thead>"
    summary = f"{escape(skill['name'])}, after {escape(stage)}"
    opened = " open" if len(labels) <= 20 else ""
    made = f'<div class="scroll">{made}<tbody>{body}</tbody></table></div>'
    parts.append(f"<details{opened}><summary>{summary}</summary>{made}</details>")
  return "".join(parts)


def label_sets(report: Report) -> str:
  """Returns for each task with several labels a text a table of its labels, of the stage that is shown."""
  stage, parts = _stage(report), []
  for skill, entry in _entries(report):
    chosen = entry.get("label_sets")
    if not chosen:
      continue
    body = ""
    for label, found in entry["per_class"].items():
      figures = [chosen["thresholds"][label], *(found[key] for key in ("precision", "recall", "f1"))]
      cells = "".join(f"<td>{number(value)}</td>" for value in figures)
      body += f"<tr><th>{escape(label)}</th><td>{found['n']:,.0f}</td>{cells}</tr>"
    said = f"after {stage}: {chosen['sets']:,} sets are scored; "
    said += f"fitted on {chosen['rows']:,} validation rows" if chosen["rows"] else "nothing was fitted"
    note = f" ({chosen['note']})" if chosen["note"] else ""
    shown = table(("", "rows", "threshold", "precision", "recall", "F1"), body)
    parts.append(f'<p class="note">{escape(skill["name"])}, {escape(said + note)}.</p>{shown}')
  return "".join(parts)


def _stage(report: Report) -> str:
  return find_roles(report).multitask or report["stages"][-1]["name"]


def _entries(report: Report) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """Returns each skill with its metrics of the stage that is shown."""
  row = report.get("matrix", {}).get(_stage(report), {})
  return [(skill, row.get(skill["name"], {})) for skill in report["skills"]]
