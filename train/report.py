"""The report of a recipe: `report.json` for programs, `report.html` for people.

    {"domain", "architecture", "size", "parameters", "created",
     "stages":  [{"name", "init_from", "kind": "main" | "arm", "steps", "tokens", "seconds", "loss": [[step, loss]],
                  "task_loss": [[step, {source: loss}]],
                  "task_gradients": [[step, {source: share of the gradient's norm}]],
                  "validation": [[step, {task: value}]],    while it was trained
                  "best": {"step", "skill", "value"} or null,    the step that the stage's parameters are of
                  "sweep": {"of": "replay" | "averaging", "share", "with"} of some arms}],
     "skills":  [{"name", "kind", "metric", "higher_is_better", "labels", "retained": true of an old skill}],
     "matrix":  {stage: {skill: {"value", "interval": [low, high], "n", further metrics}}},      on the test split
     "baselines": {task: {baseline: {"value", …}}},
     "samples": {task: [{"input", "target", "outputs": {stage: text}}]},
     "mixture": {stage: {component: {"asked", "share", "examples", "supervised_tokens", "passes"}}}}

and, added here, by train/retention.py and train/gate.py:

    {"changes":   {stage: {skill: change}},           each stage against that which it started from
     "earlier":   {stage: {stage: {skill: change}}},  … and against those further back
     "arms":      {arm: {skill: change}},             each arm against the main line's last stage
     "retention": {stage: {skill: {"best", "share"}}},  of the best earlier stage's value
     "transfer":  {stage: {"texts" | "tasks": {"backward", "skills": {skill: {"learned", "change"}}}}},
     "gate":      {"passed", "rules": {name: {"passed", "checks"}}}}   where there are rules, see `gate.judge`

A change is {"from", "absolute", "relative", "verdict"}, and {"low", "high", "p", "n"} where both stages have scores of
the same examples: see `retention.changes`. Further metrics of a task, see `evaluate_task` in train/evaluate.py:

    either          "metric": the headline's name, "templates": [value] where there are several
    generation      the names in `GENERATION` (train/text_metrics.py) that the task asks for
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import put
from train import gate
from train.report_html import render
from train.retention import Scores, against_multitask, backward_transfer, changes, earlier_changes, retention


def write_report(
  report: Mapping[str, Any],
  folder: str | Path,
  scores: Scores | None = None,
  rules: Mapping[str, Sequence[gate.Rule]] | None = None,
) -> None:
  """Writes `report.json` (keys sorted) and `report.html` into a folder; a reader never sees half a file.

  Args:
    report: see the top of this file; what is said there to be added is added here.
    folder: the recipe's workdir; made where it is missing.
    scores: stage -> skill -> the parts of its headline, see `retention.changes`.
    rules: of the gate, from `gate.read_rules`.

  Raises:
    TypeError: a value that JSON cannot hold, with its place in the report.
  """
  full = plain(completed(report, scores, rules))
  write_page(folder, "report", full, render)


def completed(
  report: Mapping[str, Any], scores: Scores | None = None, rules: Mapping[str, Sequence[gate.Rule]] | None = None
) -> dict[str, Any]:
  """Returns a report with what is computed from its numbers; arguments as of `write_report`."""
  full = {
    **report,
    "changes": changes(report, scores),
    "earlier": earlier_changes(report, scores),
    "arms": against_multitask(report, scores),
    "retention": retention(report),
    "transfer": backward_transfer(report),
  }
  return full | ({"gate": gate.judge(rules, report, scores or {})} if rules else {})


def write_page(
  folder: str | Path, name: str, values: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]
) -> None:
  """Writes `NAME.json` (keys sorted) and what `render` makes of it, `NAME.html`; the folder is made if missing."""
  folder = Path(folder)
  # The numbers first: they are safe even if drawing fails.
  text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
  put(folder / f"{name}.json", text + "\n")
  put(folder / f"{name}.html", render(values))


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
