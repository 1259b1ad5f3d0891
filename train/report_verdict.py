"""What a report's numbers say, in sentences: nothing here is said that the numbers do not show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Report = Mapping[str, Any]
LEVEL_WITHIN = 0.02  # two scores whose relative difference is no larger are called level
_TESTED = {"gained": "ahead", "kept": "level", "forgotten": "behind", "cannot tell": "unsure"}
_OUTCOMES = {
  "behind": "loses on",
  "ahead": "gains on",
  "level": "changes little on",
  "unsure": "makes no difference that the test rows could show on",
}


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
  """Returns the skills that are the domain's tasks, not perplexities nor old skills."""
  return [skill for skill in report["skills"] if skill["kind"] != "perplexity" and not skill.get("retained")]


def value_of(report: Report, stage: str, skill: str) -> float | None:
  """Returns a stage's headline value of a skill; None where it was not measured or is not finite."""
  return report.get("matrix", {}).get(stage, {}).get(skill, {}).get("value")


def best_baseline(report: Report, skill: str) -> float | None:
  """Returns the best value that a task's baselines reach; None where there are none."""
  values = [found.get("value") for found in report.get("baselines", {}).get(skill, {}).values()]
  best = max if _sign(report, skill) > 0 else min
  return best((value for value in values if value is not None), default=None)


def rows_of(report: Report, skill: str) -> list[int]:
  """Returns the numbers of examples that stages were measured on for a skill: one, unless they differ."""
  return sorted({row[skill]["n"] for row in report.get("matrix", {}).values() if row.get(skill, {}).get("n")})


def verdict(report: Report) -> list[str]:
  """Says what the numbers show: continued pre-training, the one model, the lone arms, the shortcut.

  Args:
    report: see `train/report.py`; with "arms" arms are compared by those verdicts, else by `LEVEL_WITHIN`.

  Returns:
    Sentences of plain text (not escaped); one that says so where nothing can be compared yet.
  """
  roles = find_roles(report)
  lines = [*_continued(report, roles), *_one_model(report, roles)]
  for arm, task in roles.alone.items():
    lines += _alone(report, roles, arm, task)
  lines += [*_skipped(report, roles), *_old(report, roles)]
  return [*lines, *_caution(report)] if lines else ["Too few stages have been measured to compare them yet."]


def number(value: float | None) -> str:
  """Writes a value with as many digits as it can carry.

  Example:
    >>> number(0.5), number(12.34), number(4977.05), number(None)
    ('0.500', '12.3', '4,977', '–')
  """
  if value is None:
    return "–"
  return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def p_value(p: float) -> str:
  """Writes a p-value; one below 0.001 is only bounded.

  Example:
    >>> p_value(0.0341), p_value(0.0004)
    ('p 0.034', 'p < 0.001')
  """
  return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def percent(share: float) -> str:
  """Writes a relative change with its sign; beyond tenfold as a factor.

  Example:
    >>> percent(-0.184), percent(0.0), percent(53.5)
    ('−18 %', '±0 %', '×54')
  """
  if share > 9:
    return f"×{share + 1:,.0f}"
  if -1 < share < -0.9:
    return f"÷{1 / (share + 1):,.0f}"
  rounded = round(100 * share)
  return "±0 %" if rounded == 0 else f"{rounded:+d} %".replace("-", "−")


def _continued(report: Report, roles: Roles) -> list[str]:
  """What continued pre-training, and then fine-tuning, did to every text: what was gained and what it cost."""
  lines = []
  if moves := _moves(report, roles.base, roles.continued):
    lines.append(f"Continued pre-training took {_list(moves)}; lower is better.")
  if moves := _moves(report, roles.continued, roles.multitask):
    lines.append(f"Fine-tuning on the tasks then took {_list(moves)}.")
  return lines


def _moves(report: Report, earlier: str, later: str) -> list[str]:
  """Says how each perplexity moved between two stages, the domain's first; a lost one is said, not left out."""
  names = [skill["name"] for skill in report["skills"] if skill["kind"] == "perplexity"]
  names.sort(key=lambda name: name not in ("domain", report.get("domain")))  # the rest keep their order
  moves = []
  for name in names:
    before, after = value_of(report, earlier, name), value_of(report, later, name)
    if before and after:
      moves.append(f"{name} perplexity from {number(before)} to {number(after)} ({percent(after / before - 1)})")
    elif before and name in report.get("matrix", {}).get(later, {}):
      moves.append(f"{name} perplexity from {number(before)} to no finite number")
  return moves


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
  behind = [name for name in against if _sign(report, name) * (measured[name] - against[name]) <= 0]
  if not behind:
    where = {1: next(iter(against)), 2: "both"}.get(len(against), f"all {len(against)}")
    intervals = {name: report["matrix"][roles.multitask][name].get("interval") for name in against}
    unsure = [name for name, ends in intervals.items() if ends and ends[0] <= against[name] <= ends[1]]
    doubt = f", on {_list(unsure)} by less than the test rows can tell" if unsure else ""
    return [line, f"It beats the best baseline that needs no language model on {where}{doubt}."]
  losses = _list([f"{name} ({number(measured[name])} against {number(against[name])})" for name in behind])
  return [
    line,
    f"It does not do all of them yet: a baseline that needs no language model is as good or better on {losses}.",
  ]


def _alone(report: Report, roles: Roles, arm: str, task: str) -> list[str]:
  others = [other["name"] for other in tasks_of(report) if other["name"] != task]
  compared = _compare(report, arm, roles.multitask, others)
  if not compared:
    return []
  own = value_of(report, arm, task), value_of(report, roles.multitask, task)
  start = f"Tuned on {task} alone{_steps(report, arm, roles.multitask)}"
  if None not in own:
    start += f", a model reaches {number(own[0])} there against the one model's {number(own[1])}"
  behind = [row for row in compared if row[1] == "behind"]
  if not behind:
    sure = "" if all(row[1] != "unsure" for row in compared) else " that the test rows could show"
    others = "task" if len(compared) == 1 else f"{len(compared)} tasks"
    return [f"{start}, and loses nothing{sure} on the other {others}."]
  name, _, ours, theirs = min(behind, key=lambda row: _sign(report, row[0]) * (row[2] - row[3]))
  share = f"all {len(compared)}" if len(behind) == len(compared) else f"{len(behind)} of the {len(compared)}"
  where = "on the other task" if len(compared) == 1 else f"on {share} other tasks, most on"
  most = f"{where}{'' if len(compared) > 1 else ','} {name}: {number(ours)} instead of {number(theirs)}"
  return [f"{start}, but falls behind {most}."]


def _skipped(report: Report, roles: Roles) -> list[str]:
  compared = _compare(report, roles.skipped, roles.multitask, [task["name"] for task in tasks_of(report)])
  if not compared:
    return []
  said = []
  for outcome, words in _OUTCOMES.items():
    rows = [f"{row[0]} ({number(row[2])} instead of {number(row[3])})" for row in compared if row[1] == outcome]
    said += [f"{words} {_list(rows)}"] if rows else []
  steps = _steps(report, roles.skipped, roles.multitask)
  return [f"Skipping continued pre-training{steps} {_list(said)}."]


def _old(report: Report, roles: Roles) -> list[str]:
  """Says what became of the old skills from the first stage to the last."""
  found = report.get("earlier", {}).get(roles.multitask, {}).get(roles.base, {})
  old = [skill["name"] for skill in report["skills"] if skill.get("retained") and skill["name"] in found]
  lost = [name for name in old if found[name]["verdict"] == "forgotten"]
  values = {name: [number(value_of(report, at, name)) for at in (roles.multitask, roles.base)] for name in lost}
  said = [f"{name} ({now} instead of {then})" for name, (now, then) in values.items()]
  if not old:
    return []
  of = f"Of {_count(len(old), 'old skill')}, measured and not trained, {roles.multitask} has forgotten"
  return [f"{of} {_list(said)}." if lost else f"{of} none that could be shown."]


def _steps(report: Report, arm: str, other: str) -> str:
  """Says how many steps two stages took, where they differ."""
  steps = {stage["name"]: stage.get("steps") for stage in report["stages"]}
  own, theirs = steps.get(arm), steps.get(other)
  return "" if own == theirs or None in (own, theirs) else f" ({own:,} steps, the one model {theirs:,})"


def _caution(report: Report) -> list[str]:
  """Says how far to trust a comparison: chance (95 % interval at its widest), and baselines on other rows."""
  lines = []
  labelled = [skill["name"] for skill in tasks_of(report) if skill["kind"] == "classification"]
  counts = [count for name in labelled for count in rows_of(report, name)]
  if counts:
    half = 1.96 * math.sqrt(0.25 / min(counts))
    lines.append(f"With {min(counts):,} test rows an accuracy is sure to about ±{half:.2f} only.")
  for skill in tasks_of(report):
    measured = {found.get("n") for found in report.get("baselines", {}).get(skill["name"], {}).values()} - {None}
    if measured and (rows := rows_of(report, skill["name"])) and measured != set(rows):
      lines.append(
        f"Stages were measured on fewer or other test rows than the baselines ({rows[0]:,} against {max(measured):,} "
        f"on {skill['name']}): compare the two with care."
      )
      break
  return lines


def _compare(report: Report, arm: str, other: str, names: Sequence[str]) -> list[tuple[str, str, float, float]]:
  """Lists (task, "ahead" | "level" | "behind" | "unsure", the arm's value, the other's) where both were measured."""
  rows, tested = [], report.get("arms", {}).get(arm, {})
  for name in names:
    ours, theirs = value_of(report, arm, name), value_of(report, other, name)
    if ours is None or theirs is None:
      continue
    level = abs(ours - theirs) <= LEVEL_WITHIN * abs(theirs)
    ahead = _sign(report, name) * (ours - theirs) > 0
    outcome = "level" if level else "ahead" if ahead else "behind"
    if tested.get(name, {}).get("from") == other:
      outcome = _TESTED[tested[name]["verdict"]]
    rows.append((name, outcome, ours, theirs))
  return rows


def _sign(report: Report, name: str) -> int:
  skill = next(skill for skill in report["skills"] if skill["name"] == name)
  return 1 if skill.get("higher_is_better", skill["kind"] != "perplexity") else -1


def _list(items: Sequence[str]) -> str:
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _count(count: int, noun: str) -> str:
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
