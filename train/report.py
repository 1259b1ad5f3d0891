"""The report of a recipe: `report.json` for programs, `report.html` for people.

    {"domain", "architecture", "size", "parameters", "created",
     "stages":  [{"name", "init_from", "kind": "main" | "arm", "steps", "tokens", "seconds", "loss": [[step, loss]]}],
     "skills":  [{"name", "kind", "metric", "higher_is_better", "labels"}],
     "matrix":  {stage: {skill: {"value", "n", further metrics}}},      on the test split
     "changes": {stage: {skill: {"from", "absolute", "relative", "verdict"}}},      added here
     "baselines": {task: {baseline: {"value", …}}},
     "samples": {task: [{"input", "target", "outputs": {stage: text}}]},
     "mixture": {stage: {component: {"asked", "share", "examples", "supervised_tokens", "passes"}}}}

Only "stages" and "skills" are required, and in them "name" and "kind"; what else is missing is left out of the page.
Numbers that are not finite become null in both files.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.report_html import render

KEPT_WITHIN = 0.02  # a relative change no larger than this is called "kept"


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
  """Writes `report.json` (keys sorted) and `report.html` into a folder; a reader never sees half a file.

  Args:
    report: see the top of this file; "changes" is added here.
    folder: the recipe's workdir; made where it is missing.

  Raises:
    TypeError: a value that JSON cannot hold, with its place in the report.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  full = plain({**report, "changes": changes(report)})
  # The numbers first: they are safe even if drawing fails.
  text = json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
  _replace(folder / "report.json", text + "\n")
  _replace(folder / "report.html", render(full))


def changes(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
  """Compares each stage with the one it started from.

  Args:
    report: see the top of this file.

  Returns:
    For each stage and skill: `from` (the earlier stage), `absolute` (after minus before, in the skill's unit),
    `relative` (to before; None where that is 0), `verdict`: "kept" within 2 %, else "gained" or "forgot", whichever
    direction is better. A value that is not finite counts as the worst there is, and has no difference (None).

  Example:
    >>> report = {"stages": [{"name": "a"}, {"name": "b", "init_from": "a"}],
    ...           "skills": [{"name": "perplexity", "higher_is_better": False}],
    ...           "matrix": {"a": {"perplexity": {"value": 8.0}}, "b": {"perplexity": {"value": 6.0}}}}
    >>> changes(report)
    {'b': {'perplexity': {'from': 'a', 'absolute': -2.0, 'relative': -0.25, 'verdict': 'gained'}}}
  """
  matrix = report.get("matrix", {})
  result: dict[str, dict[str, dict[str, Any]]] = {}
  for stage in report["stages"]:
    source = stage.get("init_from")
    before, after = matrix.get(source, {}), matrix.get(stage["name"], {})
    found = {
      name: {"from": source, **_change(before[name].get("value"), after[name].get("value"), _higher_is_better(skill))}
      for skill in report["skills"]
      if (name := skill["name"]) in before and name in after
    }
    if found:
      result[stage["name"]] = found
  return result


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
    verdict = "kept" if known[0] == known[1] else "gained" if known[1] else "forgot"
    return {"absolute": None, "relative": None, "verdict": verdict}
  absolute = after - before
  better = absolute if higher_is_better else -absolute
  kept = abs(absolute) <= KEPT_WITHIN * abs(before)
  verdict = "kept" if kept else "gained" if better > 0 else "forgot"
  return {"absolute": absolute, "relative": absolute / abs(before) if before else None, "verdict": verdict}


def _replace(path: Path, text: str) -> None:
  part = path.with_name(path.name + ".part")
  part.write_text(text, encoding="utf-8")
  os.replace(part, path)
