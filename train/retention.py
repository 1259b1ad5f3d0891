"""What each stage gained, kept or forgot: against the one it started from, any earlier one, and in the mean.

All of it is computed from the report (see train/report.py) and, where there are scores of the same examples, tested on
them (train/statistics.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from train import statistics
from train.metrics import VALUES
from train.report_verdict import find_roles, value_of
from train.text_metrics import ratio

Report = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, np.ndarray]]
Changes = dict[str, dict[str, dict[str, Any]]]
KEPT_WITHIN = 0.02  # a relative change no larger than this is called "kept"


def changes(report: Report, scores: Scores | None = None) -> Changes:
  """Compares each stage with the one it started from.

  Args:
    report: see `train/report.py`.
    scores: stage -> skill -> the parts of its headline, float64 [templates, examples, K].

  Returns:
    For each stage and skill: `from` (the earlier stage), `absolute` (after minus before, in the skill's unit),
    `relative` (to before; None where that is 0), `verdict`. With scores of the same examples also `low` and `high` (the
    95 % interval of `absolute`; of a perplexity, of `relative`), `p` and `n` (the examples), see `statistics.compare`;
    then the verdict is "kept", "gained", "forgotten" or "cannot tell", see `statistics.judge`. Without, it is what the
    values alone say: "kept" within 2 %, else "gained" or "forgotten", whichever direction is better. A value that is
    not finite counts as the worst there is, and has no difference (None).

  Example:
    >>> report = {"stages": [{"name": "a"}, {"name": "b", "init_from": "a"}],
    ...           "skills": [{"name": "perplexity", "higher_is_better": False}],
    ...           "matrix": {"a": {"perplexity": {"value": 8.0}}, "b": {"perplexity": {"value": 6.0}}}}
    >>> changes(report)
    {'b': {'perplexity': {'from': 'a', 'absolute': -2.0, 'relative': -0.25, 'verdict': 'gained'}}}
  """
  return compared(report, {stage["name"]: stage.get("init_from") for stage in report["stages"]}, scores or {})


def earlier_changes(report: Report, scores: Scores | None = None) -> dict[str, Changes]:
  """Compares each stage with those further back than the one it started from.

  Returns:
    Stage -> earlier stage, the nearest first -> skill -> change, see `changes`.
  """
  found: dict[str, Changes] = {}
  for stage in report["stages"]:
    for other in lineage(report, stage["name"])[1:]:
      if change := compared(report, {stage["name"]: other}, scores or {}):
        found.setdefault(stage["name"], {})[other] = change[stage["name"]]
  return found


def against_multitask(report: Report, scores: Scores | None = None) -> Changes:
  """Compares each arm with the one model, the main line's last stage; {} where there is none yet.

  Args:
    report, scores: see `changes`.

  Returns:
    As `changes`: "gained" is a skill that the arm is better at than the one model, "forgotten" one it is worse at.
  """
  other = find_roles(report).multitask
  pairs = {stage["name"]: other for stage in report["stages"] if stage.get("kind") == "arm"}
  return compared(report, pairs, scores or {}) if other else {}


def lineage(report: Report, stage: str) -> list[str]:
  """Returns the stages that a stage comes from, the nearest first.

  Example:
    >>> report = {"stages": [{"name": "a"}, {"name": "b", "init_from": "a"}, {"name": "c", "init_from": "b"}]}
    >>> lineage(report, "c")
    ['b', 'a']
  """
  sources = {found["name"]: found.get("init_from") for found in report["stages"]}
  line: list[str] = []
  while (stage := sources.get(stage)) in sources and stage not in line:
    line.append(stage)
  return line


def best_earlier(report: Report, stage: str, skill: Mapping[str, Any]) -> str | None:
  """Returns which stage of a stage's lineage is best at a skill; None where none was measured."""
  known = [name for name in lineage(report, stage) if value_of(report, name, skill["name"]) is not None]
  best = max if higher_is_better(skill) else min
  return best(known, key=lambda name: value_of(report, name, skill["name"]), default=None)


def retention(report: Report) -> Changes:
  """Returns how much each stage has of the best that its earlier stages had.

  Returns:
    Stage -> skill -> `best` (the stage) and `share`: value by best value; where less is better, best by value. 1 is
    kept; None where it would be divided by 0, or a value is not finite.

  Example:
    >>> report = {"stages": [{"name": "a"}, {"name": "b", "init_from": "a"}],
    ...           "skills": [{"name": "s", "kind": "generation"}],
    ...           "matrix": {"a": {"s": {"value": 0.8}}, "b": {"s": {"value": 0.6}}}}
    >>> round(retention(report)["b"]["s"]["share"], 6)
    0.75
  """
  found: Changes = {}
  for stage in (stage["name"] for stage in report["stages"]):
    for skill in report["skills"]:
      name = skill["name"]
      best = best_earlier(report, stage, skill)
      if best is None or name not in report.get("matrix", {}).get(stage, {}):
        continue
      now, then = value_of(report, stage, name), value_of(report, best, name)
      over, under = (now, then) if higher_is_better(skill) else (then, now)
      share = over / under if finite(over) and finite(under) and under > 0 else None
      found.setdefault(stage, {})[name] = {"best": best, "share": share}
  return found


def backward_transfer(report: Report) -> dict[str, dict[str, Any]]:
  """Returns, for each stage, the mean over the skills learned before it of: value now minus value right after learned.

  With R[s,i] the value of skill i after stage s, larger better (of a perplexity: minus its logarithm, so nats a token;
  of any other metric where less is better: minus the value), and l(i) the stage of s's lineage that learned i,

      BWT(s) = mean over i with l(i) before s of (R[s,i] - R[l(i),i])

  which is Lopez-Paz and Ranzato's for a line of stages that learn a skill each. l(i) is the first stage of the lineage
  that trained on it; general text and the old skills of `config.retain` were known at the start, so theirs is the
  first stage. A skill that is first learned by s itself, or never, does not count. Nats and points do not add: texts
  and tasks have a mean of their own.

  Returns:
    Stage -> {"texts", "tasks"} -> {"backward": the mean, "skills": {skill: {"learned": l(i), "change": difference}}};
    what has no skill is left out. Below 0: forgotten.

  Reference:
    Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning" (2017), section 2, equation 3.
  """
  result: dict[str, dict[str, Any]] = {}
  for stage in (stage["name"] for stage in report["stages"]):
    line = lineage(report, stage)[::-1]
    found: dict[str, dict[str, Any]] = {"texts": {}, "tasks": {}}
    for skill in report["skills"]:
      learned = _learned(report, line, skill)
      before, after = (_worth(report, at, skill) for at in (learned, stage))
      if learned and finite(before) and finite(after):
        group = "texts" if skill["kind"] == "perplexity" else "tasks"
        found[group][skill["name"]] = {"learned": learned, "change": after - before}
    means = {
      group: {"backward": sum(skill["change"] for skill in skills.values()) / len(skills), "skills": skills}
      for group, skills in found.items()
      if skills
    }
    result |= {stage: means} if means else {}
  return result


def _learned(report: Report, line: list[str], skill: Mapping[str, Any]) -> str:
  """Returns which stage of a lineage, the oldest first, learned a skill; "" where none did."""
  if line and (skill.get("retained") or skill["name"] == "general"):
    return line[0]
  mixture = report.get("mixture", {})
  return next((at for at in line if mixture.get(at, {}).get(skill["name"], {}).get("examples")), "")


def _worth(report: Report, stage: str, skill: Mapping[str, Any]) -> float | None:
  value = value_of(report, stage, skill["name"])
  if skill["kind"] == "perplexity":
    return -math.log(value) if finite(value) and value > 0 else None
  return value if value is None or higher_is_better(skill) else -value


def compared(report: Report, pairs: Mapping[str, str | None], scores: Scores) -> Changes:
  """Compares stages.

  Args:
    report: see `train/report.py`.
    pairs: stage -> the one it is compared with.
    scores: see `changes`.

  Returns:
    Stage -> skill -> change, see `changes`.
  """
  matrix = report.get("matrix", {})
  result: Changes = {}
  for stage, source in pairs.items():
    before, after = matrix.get(source, {}), matrix.get(stage, {})
    for skill in report["skills"]:
      name = skill["name"]
      if name in before and name in after:
        parts = scores.get(source, {}).get(name), scores.get(stage, {}).get(name)
        change = compare_values(before[name].get("value"), after[name].get("value"), skill, *parts)
        result.setdefault(stage, {})[name] = {"from": source, **change}
  return result


def compare_values(
  before: float | None,
  after: float | None,
  skill: Mapping[str, Any],
  earlier: np.ndarray | None = None,
  later: np.ndarray | None = None,
) -> dict[str, Any]:
  """Compares two values of a skill, on their examples' parts where both are there: a change, see `changes`."""
  change = _change(before, after, higher_is_better(skill))
  if change["absolute"] is None or earlier is None or later is None:
    return change
  return change | _sure(before, skill, earlier, later)


def same_examples(skill: Mapping[str, Any], earlier: np.ndarray, later: np.ndarray) -> bool:
  """Says whether two skills' parts can be of the same examples: as many, and for texts with as many tokens each."""
  if earlier.shape != later.shape or earlier.shape[1] < 2:
    return False
  return skill.get("metric") != "perplexity" or np.array_equal(earlier[..., 1], later[..., 1])


def _sure(before: float, skill: Mapping[str, Any], earlier: np.ndarray, later: np.ndarray) -> dict[str, Any]:
  """Returns interval, p-value, examples and verdict; {} where the parts are not of the same examples."""
  if not same_examples(skill, earlier, later):
    return {}
  better = 1 if higher_is_better(skill) else -1
  if skill["metric"] == "perplexity":
    # A perplexity changes by factors: a difference of its logarithm, which is nats a token.
    found = statistics.compare(earlier, later, ratio, bounded=False)
    found |= {"low": math.expm1(found["low"]), "high": math.expm1(found["high"])}
    before = 1.0
  else:
    found = statistics.compare(earlier, later, VALUES[skill["metric"]])
  return {**found, "n": earlier.shape[1], "verdict": statistics.judge(found, before, better, KEPT_WITHIN)}


def higher_is_better(skill: Mapping[str, Any]) -> bool:
  """Says which direction of a skill's value is better."""
  return skill.get("higher_is_better", skill.get("kind") != "perplexity")


def finite(value: float | None) -> bool:
  """Says whether there is a value, and it is finite."""
  return value is not None and math.isfinite(value)


def _change(before: float | None, after: float | None, higher: bool) -> dict[str, Any]:
  known = [finite(value) for value in (before, after)]
  if not all(known):
    verdict = "kept" if known[0] == known[1] else "gained" if known[1] else "forgotten"
    return {"absolute": None, "relative": None, "verdict": verdict}
  absolute = after - before
  better = absolute if higher else -absolute
  kept = abs(absolute) <= KEPT_WITHIN * abs(before)
  verdict = "kept" if kept else "gained" if better > 0 else "forgotten"
  return {"absolute": absolute, "relative": absolute / abs(before) if before else None, "verdict": verdict}
