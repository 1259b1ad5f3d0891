"""What a report's numbers say, in sentences: nothing here is said that the numbers do not show."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Report = Mapping[str, Any]
LEVEL_WITHIN = 0.02  # two scores whose relative difference is no larger are called level


class Roles(NamedTuple):
  """Which stage plays which part; "" where none does.

  Attributes:
    base: the main line's start.
    continued: after continued pre-training.
    multitask: the main line's end, the one model.
    alone: arm -> the one task that it was tuned on.
    skipped: the arm tuned on all tasks straight from `base`.
  """

  base: str
  continued: str
  multitask: str
  alone: dict[str, str]
  skipped: str


def find_roles(report: Report) -> Roles:
  """Finds the stages' parts: by their usual names, else by their place in the main line and where arms start.

  Args:
    report: see `train/report.py`.
  """
  main = [stage["name"] for stage in report["stages"] if stage.get("kind", "main") == "main"]
  places = dict(zip(("base", "continued"), main, strict=False)) | ({"multitask": main[-1]} if len(main) > 2 else {})
  base, continued, multitask = (
    name if name in main else places.get(name, "") for name in ("base", "continued", "multitask")
  )
  tasks = {skill["name"] for skill in tasks_of(report)}
  alone, skipped = {}, ""
  for stage in report["stages"]:
    if stage.get("kind") != "arm":
      continue
    learned = tasks & set(report.get("mixture", {}).get(stage["name"], {})) or tasks & {
      stage["name"].removeprefix("only_")
    }
    if len(learned) == 1 and len(tasks) > 1:
      alone[stage["name"]] = next(iter(learned))
    elif stage.get("init_from") == base and base:
      skipped = stage["name"]
  return Roles(base, continued, multitask, alone, skipped)


def tasks_of(report: Report) -> list[Mapping[str, Any]]:
  """Returns the skills that are tasks, not perplexities."""
  return [skill for skill in report["skills"] if skill["kind"] != "perplexity"]


def value_of(report: Report, stage: str, skill: str) -> float | None:
  """Returns a stage's headline value of a skill; None where it was not measured or is not finite."""
  return report.get("matrix", {}).get(stage, {}).get(skill, {}).get("value")


def best_baseline(report: Report, skill: str) -> float | None:
  """Returns the best value that a task's baselines reach; None where there are none."""
  values = [found.get("value") for found in report.get("baselines", {}).get(skill, {}).values()]
  return max((value for value in values if value is not None), default=None)


def verdict(report: Report) -> list[str]:
  """Says what the numbers show: continued pre-training, the one model, the lone arms, the shortcut.

  Args:
    report: see `train/report.py`.

  Returns:
    Sentences of plain text (not escaped); one that says so where nothing can be compared yet.
  """
  roles = find_roles(report)
  lines = [*_continued(report, roles), *_one_model(report, roles)]
  for arm, task in roles.alone.items():
    lines += _alone(report, roles, arm, task)
  lines += _skipped(report, roles)
  return lines or ["Too few stages have been measured to compare them yet."]


def number(value: float | None) -> str:
  """Writes a value with as many digits as it can carry.

  Example:
    >>> number(0.5), number(12.34), number(4977.05), number(None)
    ('0.500', '12.3', '4,977', '–')
  """
  if value is None:
    return "–"
  return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
  """Writes a relative change with its sign; beyond a tenfold rise as a factor.

  Example:
    >>> percent(-0.184), percent(0.0), percent(53.5)
    ('−18 %', '±0 %', '×54')
  """
  if share > 9:
    return f"×{share + 1:.0f}"
  rounded = round(100 * share)
  return "±0 %" if rounded == 0 else f"{rounded:+d} %".replace("-", "−")


def _continued(report: Report, roles: Roles) -> list[str]:
  """On the domain's text first, then what it cost elsewhere, then what fine-tuning did to it."""
  names = [skill["name"] for skill in report["skills"] if skill["kind"] == "perplexity"]
  names.sort(key=lambda name: name not in ("domain", report.get("domain")))  # the rest keep their order
  parts = []
  for name in names:
    before, after = value_of(report, roles.base, name), value_of(report, roles.continued, name)
    if before and after:
      where = f"{name} perplexity" if parts else f"perplexity on {name} text" if name != "domain" else "domain perplexity"
      parts.append(f"{where} from {number(before)} to {number(after)} ({percent(after / before - 1)})")
  if not parts:
    return []
  lines = [f"Continued pre-training took {' and '.join(parts)}; lower is better."]
  before, after = value_of(report, roles.continued, names[0]), value_of(report, roles.multitask, names[0])
  if before and after:
    lines.append(f"Fine-tuning then left {names[0]} perplexity at {number(after)} ({percent(after / before - 1)}).")
  return lines


def _one_model(report: Report, roles: Roles) -> list[str]:
  scores = {task["name"]: value_of(report, roles.multitask, task["name"]) for task in tasks_of(report)}
  measured = {name: value for name, value in scores.items() if value is not None}
  if not measured:
    return []
  said = _list([f"{name} {number(value)}" for name, value in measured.items()])
  line = f"One model, {roles.multitask}, was measured on {_count(len(measured), 'task')}: {said}."
  against = {name: best for name in measured if (best := best_baseline(report, name)) is not None}
  if not against:
    return [line]
  behind = [name for name in against if measured[name] <= against[name]]
  if not behind:
    every = "both" if len(against) == 2 else "all" if len(against) > 2 else "it"
    return [line, f"It beats the best baseline that needs no model on {every if every == 'it' else every + ' of them'}."]
  losses = _list([f"{name} ({number(measured[name])} against {number(against[name])})" for name in behind])
  return [line, f"It does not do all of them yet: a baseline that needs no model is as good or better on {losses}."]


def _alone(report: Report, roles: Roles, arm: str, task: str) -> list[str]:
  others = [other["name"] for other in tasks_of(report) if other["name"] != task]
  compared = _compare(report, arm, roles.multitask, others)
  if not compared:
    return []
  own = value_of(report, arm, task), value_of(report, roles.multitask, task)
  start = f"Tuned on {task} alone"
  if None not in own:
    start += f", a model reaches {number(own[0])} there (the one model: {number(own[1])})"
  behind = [row for row in compared if row[1] == "behind"]
  if not behind:
    return [f"{start}, and loses nothing on the other {_count(len(compared), 'task')}."]
  name, _, ours, theirs = min(behind, key=lambda row: row[2] - row[3])
  where = "on the other task" if len(compared) == 1 else f"on {len(behind)} of the other {len(compared)} tasks, most on"
  most = f"{where}{'' if len(compared) > 1 else ','} {name}: {number(ours)} instead of {number(theirs)}"
  return [f"{start}, but falls behind {most}."]


def _skipped(report: Report, roles: Roles) -> list[str]:
  compared = _compare(report, roles.skipped, roles.multitask, [task["name"] for task in tasks_of(report)])
  if not compared:
    return []
  said = _list([f"{name} {number(ours)} instead of {number(theirs)}" for name, _, ours, theirs in compared])
  outcomes = {outcome for _, outcome, _, _ in compared}
  if "behind" not in outcomes:
    judged = "costs no task anything here" if outcomes == {"level"} else "costs nothing here, and even helps"
  else:
    judged = "costs on every task" if outcomes == {"behind"} else "costs on some tasks"
    judged = "costs" if len(compared) == 1 else judged
  steps = {stage["name"]: stage.get("steps") for stage in report["stages"]}
  own, other = steps.get(roles.skipped), steps.get(roles.multitask)
  alike = "" if own is None or other is None else " (as many fine-tuning steps)" if own == other else f" ({own} steps)"
  return [f"Skipping continued pre-training{alike} {judged}: {said}."]


def _compare(report: Report, arm: str, other: str, names: Sequence[str]) -> list[tuple[str, str, float, float]]:
  """Lists (task, "ahead" | "level" | "behind", the arm's value, the other's) where both were measured."""
  rows = []
  for name in names:
    ours, theirs = value_of(report, arm, name), value_of(report, other, name)
    if ours is None or theirs is None:
      continue
    level = abs(ours - theirs) <= LEVEL_WITHIN * abs(theirs)
    rows.append((name, "level" if level else "ahead" if ours > theirs else "behind", ours, theirs))
  return rows


def _list(items: Sequence[str]) -> str:
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _count(count: int, noun: str) -> str:
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
