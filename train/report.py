"""The report of a recipe: `report.json` for programs, `report.html` for people.

    {"domain", "architecture", "size", "parameters", "created",
     "stages":  [{"name", "init_from", "kind": "main" | "arm", "steps", "tokens", "seconds", "loss": [[step, loss]],
                  "task_gradients": [[step, {source: share of the gradient's norm}]],
                  "validation": [[step, {task: value}]],    while it was trained
                  "best": {"step", "skill", "value"} or null}],    the step that the stage's parameters are of
     "skills":  [{"name", "kind", "metric", "higher_is_better", "labels"}],
     "matrix":  {stage: {skill: {"value", "interval": [low, high], "n", further metrics}}},      on the test split
     "changes": {stage: {skill: change}},      each stage against that which it started from; added here
     "arms":    {arm: {skill: change}},        each arm against the main line's last stage; added here
     "baselines": {task: {baseline: {"value", …}}},
     "samples": {task: [{"input", "target", "outputs": {stage: text}}]},
     "mixture": {stage: {component: {"asked", "share", "examples", "supervised_tokens", "passes"}}}}

A change is {"from", "absolute", "relative", "verdict"}, and {"low", "high", "p"} where both stages have scores of the
same examples: see `changes`. Further metrics of a task, see `evaluate_task` in train/evaluate.py:

    either          "metric": the headline's name, "templates": [value] where there are several
    generation      the names in `GENERATION` (train/metrics.py) that the task asks for
    classification  "accuracy", "macro_f1", "per_class": {label: {"precision", "recall", "f1", "n"}}, "confusion",
                    "label_score", "accuracies": {label score: accuracy}, "generated": {"valid", "accuracy"},
                    "calibration": {"label_score", "temperature", "rows", "note", "target_accuracy", "threshold",
                                    "ece", "nll", "reliability": each {"before", "after"}, "curve",
                                    "coverage", "accuracy" (with a threshold)}
    multi_label     "micro_f1", "macro_f1", "subset_accuracy", "hamming_loss", "per_class" as above,
                    "generated": {"valid", "micro_f1", "subset_accuracy"},
                    "label_sets": {"sets": how many are scored, "thresholds": {label: probability}, "temperature",
                                   "rows", "note"}

Only "stages" and "skills" are required, and in them "name" and "kind"; what else is missing is left out of the page.
Numbers that are not finite become null in both files.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import statistics
from train.metrics import VALUES, ratio
from train.report_html import render
from train.report_verdict import find_roles

Scores = Mapping[str, Mapping[str, np.ndarray]]
KEPT_WITHIN = 0.02  # a relative change no larger than this is called "kept"


def write_report(report: Mapping[str, Any], folder: str | Path, scores: Scores | None = None) -> None:
  """Writes `report.json` (keys sorted) and `report.html` into a folder; a reader never sees half a file.

  Args:
    report: see the top of this file; "changes" and "arms" are added here.
    folder: the recipe's workdir; made where it is missing.
    scores: stage -> skill -> the parts of its headline, see `changes`.

  Raises:
    TypeError: a value that JSON cannot hold, with its place in the report.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  full = plain({**report, "changes": changes(report, scores), "arms": against_multitask(report, scores)})
  # The numbers first: they are safe even if drawing fails.
  text = json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
  _replace(folder / "report.json", text + "\n")
  _replace(folder / "report.html", render(full))


def changes(report: Mapping[str, Any], scores: Scores | None = None) -> dict[str, dict[str, dict[str, Any]]]:
  """Compares each stage with the one it started from.

  Args:
    report: see the top of this file.
    scores: stage -> skill -> the parts of its headline, float64 [templates, examples, K].

  Returns:
    For each stage and skill: `from` (the earlier stage), `absolute` (after minus before, in the skill's unit),
    `relative` (to before; None where that is 0), `verdict`. With scores of the same examples also `low` and `high` (the
    95 % interval of `absolute`; of a perplexity, of `relative`) and `p`, see `statistics.compare`; then the verdict is
    "kept", "gained", "forgotten" or "cannot tell", see `statistics.judge`. Without, it is what the values alone say:
    "kept" within 2 %, else "gained" or "forgotten", whichever direction is better. A value that is not finite counts as
    the worst there is, and has no difference (None).

  Example:
    >>> report = {"stages": [{"name": "a"}, {"name": "b", "init_from": "a"}],
    ...           "skills": [{"name": "perplexity", "higher_is_better": False}],
    ...           "matrix": {"a": {"perplexity": {"value": 8.0}}, "b": {"perplexity": {"value": 6.0}}}}
    >>> changes(report)
    {'b': {'perplexity': {'from': 'a', 'absolute': -2.0, 'relative': -0.25, 'verdict': 'gained'}}}
  """
  pairs = {stage["name"]: stage.get("init_from") for stage in report["stages"]}
  return _compared(report, pairs, scores or {})


def against_multitask(report: Mapping[str, Any], scores: Scores | None = None) -> dict[str, dict[str, dict[str, Any]]]:
  """Compares each arm with the one model, the main line's last stage; {} where there is none yet.

  Args:
    report, scores: see `changes`.

  Returns:
    As `changes`: "gained" is a skill that the arm is better at than the one model, "forgotten" one it is worse at.
  """
  other = find_roles(report).multitask
  pairs = {stage["name"]: other for stage in report["stages"] if stage.get("kind") == "arm"}
  return _compared(report, pairs, scores or {}) if other else {}


def _compared(report: Mapping[str, Any], pairs: Mapping[str, str | None], scores: Scores) -> dict[str, Any]:
  """Returns stage -> skill -> its change from the stage that `pairs` names."""
  matrix = report.get("matrix", {})
  result: dict[str, dict[str, dict[str, Any]]] = {}
  for stage, source in pairs.items():
    before, after = matrix.get(source, {}), matrix.get(stage, {})
    for skill in report["skills"]:
      name = skill["name"]
      if name not in before or name not in after:
        continue
      change = _change(before[name].get("value"), after[name].get("value"), _higher_is_better(skill))
      parts = scores.get(source, {}).get(name), scores.get(stage, {}).get(name)
      if change["absolute"] is not None and all(found is not None for found in parts):
        change |= _sure(change, before[name]["value"], skill, *parts)
      result.setdefault(stage, {})[name] = {"from": source, **change}
  return result


def _sure(
  change: Mapping[str, Any], before: float, skill: Mapping[str, Any], earlier: np.ndarray, later: np.ndarray
) -> dict[str, Any]:
  """Returns interval, p-value and verdict from the examples' parts; {} where they are not of the same examples."""
  better = 1 if _higher_is_better(skill) else -1
  if skill["metric"] != "perplexity":
    found = statistics.compare(earlier, later, VALUES[skill["metric"]])
    return {} if found is None else {**found, "verdict": statistics.judge(found, before, better, KEPT_WITHIN)}
  # A perplexity changes by factors: a difference of its logarithm, which is nats a token.
  found = statistics.compare(earlier, later, ratio)
  if found is None or not np.array_equal(earlier[..., 1], later[..., 1]):
    return {}
  found |= {"low": math.expm1(found["low"]), "high": math.expm1(found["high"])}
  return {**found, "verdict": statistics.judge(found, 1.0, better, KEPT_WITHIN)}


def plain(value: Any, where: str = "report") -> Any:
  """Returns a value as JSON has it: dicts with string keys, lists, numbers (null where not finite), strings.

  Args:
    value: of mappings, sequences, numpy scalars and arrays, and what JSON knows.
    where: the value's place, for the error.

  Raises:
    TypeError: a value of another type.

  Example:
    >>> plain({"loss": (1, float("nan"))})
    {'loss': [1, None]}
  """
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, Mapping):
    return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
  if hasattr(value, "tolist"):  # numpy: scalars and arrays
    return plain(value.tolist(), where)
  if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
    return [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
  kind = type(value).__name__
  raise TypeError(f"{where}: expected text, numbers, lists and dicts, got a {kind}; convert it before it is reported")


def _higher_is_better(skill: Mapping[str, Any]) -> bool:
  return skill.get("higher_is_better", skill.get("kind") != "perplexity")


def _change(before: float | None, after: float | None, higher_is_better: bool) -> dict[str, Any]:
  known = [value is not None and math.isfinite(value) for value in (before, after)]
  if not all(known):
    verdict = "kept" if known[0] == known[1] else "gained" if known[1] else "forgotten"
    return {"absolute": None, "relative": None, "verdict": verdict}
  absolute = after - before
  better = absolute if higher_is_better else -absolute
  kept = abs(absolute) <= KEPT_WITHIN * abs(before)
  verdict = "kept" if kept else "gained" if better > 0 else "forgotten"
  return {"absolute": absolute, "relative": absolute / abs(before) if before else None, "verdict": verdict}


def _replace(path: Path, text: str) -> None:
  part = path.with_name(path.name + ".part")
  part.write_text(text, encoding="utf-8")
  os.replace(part, path)
