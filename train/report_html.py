"""The report as one HTML file: no network, light and dark, readable on a phone and in print."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from train.report_plots import loss_curves, task_bars

Report = Mapping[str, Any]

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--line:#d8dde3;--page:#fff;--panel:#f5f7f9;--accent:20,110,160;
 --bad:190,90,20}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#9aa5b1;--line:#353c44;--page:#14181c;--panel:#1c2127;
 --accent:90,170,220;--bad:230,140,70}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1rem 4rem;max-width:68rem;background:var(--page);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0}h2{font-size:1.15rem;margin:2.6rem 0 .6rem}
p{max-width:46rem;margin:.5rem 0}.soft,figcaption,caption{color:var(--soft);font-size:.88rem}
.flow{display:flex;flex-wrap:wrap;gap:.5rem;align-items:stretch;margin:1.4rem 0 .4rem}
.flow div{border:1px solid var(--line);border-radius:.5rem;background:var(--panel);padding:.5rem .8rem;min-width:9rem}
.flow .main{border-color:rgb(var(--accent));border-width:2px}.flow b{display:block}.flow i{font-style:normal;
 align-self:center;color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;margin:.4rem 0}
th,td{padding:.38rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left}thead th{font-weight:600;border-bottom:2px solid var(--line)}
td.text{white-space:pre-wrap;text-align:left;min-width:13rem;max-width:24rem;font-size:.86rem}
tr.arm td:first-child,tr.baseline td:first-child{padding-left:1.6rem;font-style:italic}tr.baseline{color:var(--soft)}
tr.rule td{border-top:2px solid var(--line)}td.best{font-weight:700}td.gained{color:rgb(var(--accent))}
td.forgot{color:rgb(var(--bad));font-weight:600}td.kept{color:var(--soft)}
small{display:block;color:var(--soft);font-weight:400}figure{margin:.8rem 0}svg{max-width:100%;height:auto}
.figures{display:flex;flex-wrap:wrap;gap:1rem}details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media print{body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}table,figure{break-inside:avoid}}
"""


def render(report: Report) -> str:
  """Returns the report as an HTML document.

  Args:
    report: see `train/report.py`, with "changes".
  """
  sections = [
    _header(report),
    _section("What the stages can do", _matrix(report), "On the test split. Bold: best of a column. Darker: better."),
    _section("Gained and forgotten", _changes(report), "Each stage against the one it started from."),
    _section("Training loss", loss_curves(report), "Nats a target token; each stage from its first step."),
    _section("Every task, stage by stage", task_bars(report), "Dashed: the best baseline that needs no model."),
    _section("Side by side", _samples(report), "The first rows of the test split, and what each stage answers."),
    _section("Which labels are confused", _confusions(report), "Rows: the right label. Columns: the model's."),
    _section("What each stage read", _mixtures(report), "Asked: of examples drawn. Share: of supervised tokens."),
  ]
  title = f"{report['domain']}: {report['architecture']} {report.get('size', '')}"
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
  )


def verdict(report: Report) -> list[str]:
  """Says in sentences what the numbers show: continued pre-training, the one model, the lone arms, the shortcut."""
  matrix, lines = report["matrix"], []
  tasks = [skill for skill in report["skills"] if skill["kind"] != "perplexity"]

  def value(stage: str, skill: str) -> float:
    return matrix[stage][skill]["value"]

  if {"base", "continued"} <= matrix.keys() and "domain" in matrix["base"]:
    before, after = value("base", "domain"), value("continued", "domain")
    lines.append(
      f"Continued pre-training took the domain's perplexity from {_number(before)} to {_number(after)} "
      f"({100 * (after / before - 1):+.0f} %)."
    )
  if "multitask" in matrix:
    said = ", ".join(f"{task['name']} {value('multitask', task['name']):.3f}" for task in tasks)
    lines.append(f"One model does every task: {said}.")
    lines += _lone_arms(matrix, tasks, value)
    if "multitask_without_continued" in matrix:
      said = ", ".join(
        f"{task['name']} {value('multitask_without_continued', task['name']) - value('multitask', task['name']):+.3f}"
        for task in tasks
      )
      lines.append(f"Without continued pre-training, after as many fine-tuning steps: {said}.")
  return lines


def _lone_arms(matrix: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], value) -> list[str]:
  lines = []
  for task in tasks:
    arm = f"only_{task['name']}"
    others = [other["name"] for other in tasks if other["name"] != task["name"]]
    if arm in matrix and others:
      said = ", ".join(f"{name} {value(arm, name):.3f} against {value('multitask', name):.3f}" for name in others)
      lines.append(f"Tuned on {task['name']} alone, the model falls behind on the rest: {said}." if all(
        value(arm, name) < value("multitask", name) for name in others
      ) else f"Tuned on {task['name']} alone: {said}.")
  return lines


def _header(report: Report) -> str:
  boxes = []
  for stage in report["stages"]:
    facts = f"{stage['steps']:,} steps, {_short(stage['tokens'])} tokens, {_duration(stage['seconds'])}"
    start = f"<small>from {_text(stage['init_from'])}</small>" if stage["init_from"] else ""
    box = f'<div class="{_text(stage["kind"])}"><b>{_text(stage["name"])}</b><small>{facts}</small>{start}</div>'
    boxes.append(("<i>→</i>" if stage["kind"] == "main" and stage["init_from"] else "") + box)
  main = [box for box, stage in zip(boxes, report["stages"], strict=True) if stage["kind"] == "main"]
  arms = [box for box, stage in zip(boxes, report["stages"], strict=True) if stage["kind"] != "main"]
  shown = f'<div class="flow">{"".join(main)}</div>'
  if arms:
    shown += f'<p class="soft">Beside them, to compare:</p><div class="flow">{"".join(arms)}</div>'
  about = f"{report['architecture']} {report.get('size', '')}, {_short(report['parameters'])} parameters"
  when = report.get("created", "")
  sentences = "".join(f"<p>{_text(line)}</p>" for line in verdict(report))
  return f'<h1>{_text(report["domain"])}</h1><p class="soft">{_text(about)} · {_text(when)}</p>{shown}{sentences}'


def _matrix(report: Report) -> str:
  skills, matrix = report["skills"], report["matrix"]
  columns = {skill["name"]: [row[skill["name"]]["value"] for row in matrix.values()] for skill in skills}
  head = "".join(f"<th>{_text(s['name'])}<small>{_text(_metric(s))}</small></th>" for s in skills)
  rows = []
  for stage in report["stages"]:
    cells = []
    for skill in skills:
      entry = matrix[stage["name"]][skill["name"]]
      goodness = _goodness(entry["value"], columns[skill["name"]], skill)
      best = ' class="best"' if goodness >= 1 else ""
      shade = f' style="background:rgba(var(--accent),{0.45 * goodness:.2f})"'
      cells.append(f"<td{best}{shade}>{_number(entry['value'])}<small>{_aside(entry)}</small></td>")
    rows.append(f'<tr class="{_text(stage["kind"])}"><td>{_text(stage["name"])}</td>{"".join(cells)}</tr>')
  rows += _baseline_rows(report)
  return f"<table><thead><tr><th>stage</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _baseline_rows(report: Report) -> list[str]:
  baselines = report.get("baselines", {})
  names = sorted({name for found in baselines.values() for name in found})
  rows = []
  for number, name in enumerate(names):
    cells = ""
    for skill in report["skills"]:
      found = baselines.get(skill["name"], {}).get(name)
      cells += f"<td>{_number(found['value'])}<small>{_aside(found)}</small></td>" if found else "<td>·</td>"
    rule = " rule" if number == 0 else ""
    rows.append(f'<tr class="baseline{rule}"><td>{_text(name.replace("_", " "))}</td>{cells}</tr>')
  return rows


def _changes(report: Report) -> str:
  head = "".join(f"<th>{_text(skill['name'])}</th>" for skill in report["skills"])
  rows = []
  for stage, found in report.get("changes", {}).items():
    cells = ""
    for skill in report["skills"]:
      change = found.get(skill["name"])
      if change is None:
        cells += "<td>·</td>"
        continue
      perplexity = skill["kind"] == "perplexity" and change["relative"] is not None
      size = f"{100 * change['relative']:+.0f} %" if perplexity else f"{change['absolute']:+.3f}"
      cells += f'<td class="{change["verdict"]}">{size}<small>{change["verdict"]}</small></td>'
    source = next(iter(found.values()))["from"]
    rows.append(f"<tr><td>{_text(stage)}<small>after {_text(source)}</small></td>{cells}</tr>")
  return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _samples(report: Report) -> str:
  parts = []
  for task, rows in report.get("samples", {}).items():
    stages = list(rows[0]["outputs"]) if rows else []
    head = "".join(f"<th>{_text(name)}</th>" for name in stages)
    body = ""
    for row in rows:
      cells = [row["input"], row["target"], *(row["outputs"][name] for name in stages)]
      body += "<tr>" + "".join(f'<td class="text">{_text(cell[:600])}</td>' for cell in cells) + "</tr>"
    table = f"<table><thead><tr><th>input</th><th>reference</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    parts.append(f'<details open><summary>{_text(task)}</summary><div class="scroll">{table}</div></details>')
  return "".join(parts)


def _confusions(report: Report) -> str:
  stage = "multitask" if "multitask" in report["matrix"] else report["stages"][-1]["name"]
  parts = []
  for skill in report["skills"]:
    counts = report["matrix"][stage].get(skill["name"], {}).get("confusion")
    if not counts:
      continue
    labels = skill["labels"]
    most = max(max(row) for row in counts) or 1
    body = ""
    for label, row in zip(labels, counts, strict=True):
      cells = "".join(f'<td style="background:rgba(var(--accent),{0.6 * n / most:.2f})">{n or "·"}</td>' for n in row)
      body += f"<tr><td>{_text(label)}</td>{cells}</tr>"
    head = "".join(f"<th>{_text(label)}</th>" for label in labels)
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    summary = f"{_text(skill['name'])} after {_text(stage)}"
    parts.append(f'<details open><summary>{summary}</summary><div class="scroll">{table}</div></details>')
  return "".join(parts)


def _mixtures(report: Report) -> str:
  rows = ""
  for stage, components in report.get("mixture", {}).items():
    for name, found in components.items():
      if name == "packing":
        continue
      share = f"<td>{found['asked']:.0%}</td><td>{found['share']:.0%}</td>"
      left_out = found.get("skipped", 0), found.get("truncated", 0)
      rows += f"<tr><td>{_text(stage)}: {_text(name)}</td>{share}<td>{found['examples']:,}</td>"
      rows += f"<td>{found['supervised_tokens']:,}</td><td>{found['passes']:.2f}</td><td>{left_out[1]}</td><td>{left_out[0]}</td></tr>"
  head = "".join(f"<th>{name}</th>" for name in ("asked", "share", "examples", "tokens", "passes", "truncated", "skipped"))
  return f"<table><thead><tr><th>stage: source</th>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""


def _section(title: str, body: str, note: str) -> str:
  return f'<h2>{title}</h2><p class="soft">{note}</p><div class="scroll">{body}</div>' if body else ""


def _metric(skill: Mapping[str, Any]) -> str:
  names = {"perplexity": "perplexity, lower is better", "accuracy": "accuracy", "rougeL": "ROUGE-L F1"}
  return names.get(skill["metric"], skill["metric"])


def _goodness(value: float, column: Sequence[float], skill: Mapping[str, Any]) -> float:
  low, high = min(column), max(column)
  share = (value - low) / (high - low) if high > low else 1.0
  return share if skill["higher_is_better"] else 1.0 - share


def _aside(entry: Mapping[str, Any]) -> str:
  if "bits_per_byte" in entry:
    return f"{entry['bits_per_byte']:.2f} bits a byte"
  if "macro_f1" in entry:
    return f"macro-F1 {entry['macro_f1']:.3f}"
  return f"exact {entry['exact_match']:.2f}" if "exact_match" in entry else ""


def _number(value: float) -> str:
  return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _short(count: float) -> str:
  for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if count >= size:
      return f"{count / size:.1f}{unit}"
  return str(int(count))


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes}:{rest:02d} min"


def _text(value: Any) -> str:
  return html.escape(str(value))
