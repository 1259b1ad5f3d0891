"""The report of a recipe: `report.json` for programs, `report.html` for people.

    {"domain", "architecture", "size", "parameters", "created",
     "stages":  [{"name", "init_from", "kind": "main" | "arm", "steps", "tokens", "seconds", "loss": [[step, loss]]}],
     "skills":  [{"name", "kind", "metric", "higher_is_better", "labels"}],
     "matrix":  {stage: {skill: {"value", "n", further metrics}}},      on the test split
     "changes": {stage: {skill: {"from", "absolute", "relative", "verdict"}}},
     "baselines": {task: {baseline: {"value", …}}},
     "samples": {task: [{"input", "target", "outputs": {stage: text}}]},
     "mixture": {stage: {component: {"asked", "share", "examples", "supervised_tokens", "passes"}}}}
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.report_html import render
from train.stage import write_json

KEPT_WITHIN = 0.02  # a relative change smaller than this is called "kept"


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
  """Writes `report.json` and `report.html` into a folder; a reader never sees half a file.

  Args:
    report: see the top of this file; "changes" is added here.
    folder: the recipe's workdir.
  """
  folder = Path(folder)
  report = {**report, "changes": changes(report)}
  write_json(folder / "report.json", report)
  part = folder / "report.html.part"
  part.write_text(render(report), encoding="utf-8")
  os.replace(part, folder / "report.html")


def changes(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
  """Compares each stage with the one it started from.

  Returns:
    For each stage and skill: `from` (the earlier stage), `absolute` (after minus before), `relative` (to before; None
    where that is 0), `verdict` ("gained", "kept" or "forgot", whichever direction is better).
  """
  result: dict[str, dict[str, dict[str, Any]]] = {}
  for stage in report["stages"]:
    before = report["matrix"].get(stage["init_from"])
    if not before:
      continue
    after = report["matrix"][stage["name"]]
    result[stage["name"]] = {
      skill["name"]: _change(skill, stage["init_from"], before[skill["name"]]["value"], after[skill["name"]]["value"])
      for skill in report["skills"]
      if skill["name"] in before and skill["name"] in after
    }
  return result


def _change(skill: Mapping[str, Any], earlier: str, before: float, after: float) -> dict[str, Any]:
  absolute = after - before
  better = absolute if skill["higher_is_better"] else -absolute
  kept = abs(absolute) <= KEPT_WITHIN * abs(before)
  verdict = "kept" if kept else "gained" if better > 0 else "forgot"
  return {"from": earlier, "absolute": absolute, "relative": absolute / before if before else None, "verdict": verdict}
