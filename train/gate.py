"""The gate: rules that a finished recipe must meet, so that it can guard a release.

`config.gate` holds rules by name; a rule has exactly one of the four conditions:

    config.gate = {
      "urgent":  {"skill": "urgency", "at_least": 0.9, "sure": True},
      "dialect": {"skill": "domain", "stage": "continued", "better_than": "base"},
      "kept":    {"skill": "*", "keeps": 0.9},
    }

skill          a skill of the report; "*": all of them, "tasks", "texts" (perplexities), "retained" (`config.retain`)
stage          which stage or arm must meet it; "multitask" where it is left out
at_least       the skill's value is this or more
at_most        … or less
keeps          the value has this share of the best earlier stage's (of those that the stage comes from): 0.9 is 0.9 of
               its accuracy, or 1/0.9 of its perplexity. Above 1: it must have gained
better_than    the value is better than this stage's
sure           true: the test rows must show it. at_least, at_most: the value's whole 95 % interval; keeps: the whole
               interval of the paired bootstrap; better_than: the paired interval and test, as for "gained". False,
               where it is left out: the values alone decide

A value that is not finite, or rows that cannot be compared where `sure` asks for it, fail.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from train import statistics
from train.metrics import VALUES
from train.report_verdict import number, p_value, value_of
from train.retention import Report, Scores, best_earlier, compare_values, finite, higher_is_better, same_examples

GROUPS = ("*", "tasks", "texts", "retained")
FIELDS = ("skill", "stage", "sure")


class Rule(NamedTuple):
  """One rule for one skill.

  Attributes:
    skill: of the report, see `train/report.py`.
    stage: that must meet it.
    condition: a name in `CONDITIONS`.
    asked: the condition's number or stage.
    sure: whether the test rows must show it.
  """

  skill: Mapping[str, Any]
  stage: str
  condition: str
  asked: Any
  sure: bool


class Found(NamedTuple):
  """How a rule came out.

  Attributes:
    passed: whether it is met.
    needed: what the value had to reach; None where there is nothing to compare with.
    against: the stage that it was compared with; "" where it is a number.
    said: in words, after the value.
  """

  passed: bool
  needed: float | None
  against: str
  said: str


def read_rules(
  rules: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], skills: Sequence[Mapping[str, Any]]
) -> dict[str, list[Rule]]:
  """Reads `config.gate`.

  Args:
    rules: name -> fields.
    stages: every stage and arm of the recipe: `name`, `init_from`.
    skills: every skill of the report.

  Returns:
    Name -> a rule for each skill that it means.

  Raises:
    ValueError: an unknown field, stage or skill, or a condition that cannot be.
  """
  known = {stage["name"]: stage for stage in stages}
  return {name: _read(f"config.gate.{name}", fields, known, skills) for name, fields in rules.items()}


def _read(where: str, fields: Any, stages: Mapping[str, Any], skills: Sequence[Mapping[str, Any]]) -> list[Rule]:
  if not isinstance(fields, Mapping):
    raise ValueError(f'{where}: expected fields such as {{"skill": "domain", "at_most": 3.0}}, got {fields!r}')
  conditions, sure = [name for name in fields if name in CONDITIONS], fields.get("sure", False)
  if unknown := set(fields) - {*FIELDS, *CONDITIONS}:
    raise ValueError(f"{where} has unknown {sorted(unknown)}; known are {FIELDS} and {tuple(CONDITIONS)}")
  if len(conditions) != 1:
    raise ValueError(f"{where}: expected exactly one of {tuple(CONDITIONS)}, got {conditions or 'none'}")
  if not isinstance(sure, bool):
    raise ValueError(f"{where}.sure must be true or false, got {sure!r}")
  stage, asked = fields.get("stage", "multitask"), fields[conditions[0]]
  others = [asked] if conditions[0] == "better_than" else []
  for name in (stage, *others):
    if name not in stages:
      raise ValueError(f"{where}: there is no stage {name!r}; this recipe has {list(stages)}")
  if not others and (isinstance(asked, bool) or not isinstance(asked, (int, float)) or not finite(asked)):
    raise ValueError(f"{where}.{conditions[0]} must be a number, got {asked!r}")
  if stage in others or (conditions[0] == "keeps" and (asked <= 0 or not stages[stage].get("init_from"))):
    raise ValueError(
      f"{where}: {stage!r} cannot be asked for {conditions[0]}={asked!r}: name a share above 0, and a stage "
      "that another one comes before"
    )
  return [Rule(skill, stage, conditions[0], asked, sure) for skill in _meant(where, fields.get("skill"), skills)]


def _meant(where: str, asked: Any, skills: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  text = lambda skill: skill["kind"] == "perplexity"
  belongs = {
    "*": lambda skill: True,
    "tasks": lambda skill: not text(skill),
    "texts": text,
    "retained": lambda skill: skill.get("retained", False),
  }
  names = [skill["name"] for skill in skills]
  chosen = (lambda skill: skill["name"] == asked) if asked in names else belongs.get(asked, lambda skill: False)
  found = [skill for skill in skills if chosen(skill)]
  if not found:
    raise ValueError(f"{where}.skill is {asked!r}: nothing by that name is measured; known are {names} and {GROUPS}")
  return found


def judge(rules: Mapping[str, Sequence[Rule]], report: Report, scores: Scores) -> dict[str, Any]:
  """Judges a report.

  Args:
    rules: from `read_rules`.
    report: with "stages", "skills", "matrix".
    scores: stage -> skill -> the parts of its headline.

  Returns:
    {"passed", "rules": {name: {"passed", "checks": [{"skill", "stage", "passed", "value", "needed", "against",
    "sure", "said"}]}}}. `passed` is None while a stage that is asked about is not measured yet (and nothing failed).
  """
  found = {}
  for name, several in sorted(rules.items()):
    checks = [_check(rule, report, scores) for rule in several]
    found[name] = {"passed": _all(check["passed"] for check in checks), "checks": checks}
  return {"passed": _all(rule["passed"] for rule in found.values()), "rules": found}


def lines(gate: Mapping[str, Any]) -> list[str]:
  """Returns the gate's outcome in lines for the terminal.

  Args:
    gate: from `judge`.
  """
  said = [f"gate: {outcome(gate['passed'])}"]
  for name, rule in gate["rules"].items():
    said += [f"gate: {outcome(check['passed']):7} {name}: {check['said']}" for check in rule["checks"]]
  return said


def outcome(passed: bool | None) -> str:
  """Returns a word for `passed`."""
  return "pending" if passed is None else "passed" if passed else "FAILED"


def _all(passed: Iterable[bool | None]) -> bool | None:
  several = list(passed)
  return False if False in several else None if None in several else True


def _check(rule: Rule, report: Report, scores: Scores) -> dict[str, Any]:
  name, matrix = rule.skill["name"], report.get("matrix", {})
  about = {"skill": name, "stage": rule.stage, "sure": rule.sure}
  wanted = {rule.stage, rule.asked} if rule.condition == "better_than" else {rule.stage}
  if missing := wanted - set(matrix):
    said = f"{name}: {', '.join(sorted(missing))} is not measured yet"
    return {**about, "passed": None, "value": None, "needed": None, "against": "", "said": said}
  value = value_of(report, rule.stage, name)
  if not finite(value):
    found = Found(False, None, "", "is not finite")
  else:
    found = CONDITIONS[rule.condition](rule, value, report, scores)
  said = f"{name} of {rule.stage} {number(value)} {found.said}"
  return {
    **about,
    "passed": bool(found.passed),
    "value": value,
    "needed": found.needed,
    "against": found.against,
    "said": said,
  }


def _limit(rule: Rule, value: float, report: Report, least: bool) -> Found:
  words, shown, decides = f"{'at least' if least else 'at most'} {number(rule.asked)}", "", value
  if rule.sure:
    interval = report["matrix"][rule.stage][rule.skill["name"]].get("interval")
    if not interval:
      return Found(False, rule.asked, "", f"has no interval, so it is not sure to be {words}")
    decides = interval[0 if least else 1]
    shown, words = f"({number(interval[0])} to {number(interval[1])}) ", f"surely {words}"
  passed = decides >= rule.asked if least else decides <= rule.asked
  return Found(passed, rule.asked, "", f"{shown}is {'' if passed else 'not '}{words}")


def _at_least(rule: Rule, value: float, report: Report, scores: Scores) -> Found:
  return _limit(rule, value, report, least=True)


def _at_most(rule: Rule, value: float, report: Report, scores: Scores) -> Found:
  return _limit(rule, value, report, least=False)


def _keeps(rule: Rule, value: float, report: Report, scores: Scores) -> Found:
  name, better = rule.skill["name"], higher_is_better(rule.skill)
  best = best_earlier(report, rule.stage, rule.skill)
  before = value_of(report, best, name) if best else None
  if not finite(before):
    return Found(False, None, best or "", "has no earlier value to be compared with")
  needed = rule.asked * before if better else before / rule.asked
  passed, words = (value >= needed if better else value <= needed), f"{rule.asked:g} of {best}'s {number(before)}"
  words = f"{'at least' if better else 'at most'} {number(needed)} ({words})"
  if rule.sure:
    parts = [scores.get(stage, {}).get(name) for stage in (best, rule.stage)]
    if any(found is None for found in parts) or not same_examples(rule.skill, *parts):
      return Found(False, needed, best, f"cannot be compared with {best} row by row, so it is not sure to be {words}")
    more, less = parts[::-1] if better else parts
    metric = rule.skill["metric"]
    low, high = statistics.margin(more, less, VALUES[metric], rule.asked, bounded=metric != "perplexity")
    passed, words = low >= 0, f"surely {words}; margin {_signed(low)} to {_signed(high)}"
  return Found(passed, needed, best, f"is {'' if passed else 'not '}{words}")


def _better_than(rule: Rule, value: float, report: Report, scores: Scores) -> Found:
  name, other = rule.skill["name"], rule.asked
  before = value_of(report, other, name)
  if not finite(before):
    words = f"is finite, {other}'s is not"
    return Found(not rule.sure, None, other, words + (", so it is not sure to be better" if rule.sure else ""))
  passed = value > before if higher_is_better(rule.skill) else value < before
  words = f"better than {other}'s {number(before)}"
  if rule.sure:
    parts = (scores.get(stage, {}).get(name) for stage in (other, rule.stage))
    change = compare_values(before, value, rule.skill, *parts)
    if "p" not in change:
      return Found(False, before, other, f"cannot be compared with {other} row by row, so it is not sure to be {words}")
    passed = passed and change["p"] < 1 - statistics.SURE and change["low"] * change["high"] > 0
    words = f"surely {words} ({p_value(change['p'])})"
  return Found(passed, before, other, f"is {'' if passed else 'not '}{words}")


def _signed(value: float) -> str:
  return ("−" if value < 0 else "") + number(abs(value))


Condition = Callable[[Rule, float, Report, Scores], Found]
CONDITIONS: dict[str, Condition] = {
  "at_least": _at_least,
  "at_most": _at_most,
  "keeps": _keeps,
  "better_than": _better_than,
}
