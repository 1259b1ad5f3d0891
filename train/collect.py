"""The report's numbers, collected from the stages that are done; `train/report.py` describes their form."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.arms import MAIN_LINE, Stage
from train.log import read_metrics, read_validation
from train.skills import Skills, describe_skills
from train.stage import Materials

Results = Mapping[str, Mapping[str, Any]]


def build_report(
  config: ConfigDict,
  stages: Sequence[Stage],
  materials: Materials,
  skills: Skills,
  results: Results,
  baselines: Mapping[str, Any],
  workdir: Path,
) -> dict[str, Any]:
  """Collects the report.

  Args:
    config: the recipe's.
    stages: all of it, in their order.
    materials: the domain.
    skills: what is measured.
    results: of the stages that are done, from `run_stage`.
    baselines: task -> from `train.baselines.baselines`.
    workdir: of the recipe, for the loss curves.
  """
  tasks = materials.domain.tasks
  done = [stage for stage in stages if stage.name in results]
  return {
    "domain": materials.domain.name,
    "architecture": config.architecture,
    "size": config.model.size,
    "parameters": results[done[0].name]["parameters"],
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "stages": [describe_stage(stage, results[stage.name]["run"], workdir) for stage in done],
    "skills": describe_skills(skills),
    "matrix": {stage.name: results[stage.name]["skills"] for stage in done},
    "baselines": baselines,
    "samples": {name: side_by_side(name, done, results) for name in tasks},
    "mixture": {stage.name: results[stage.name]["run"]["counts"] for stage in done},
  }


def outline(stage: Stage) -> dict[str, Any]:
  """Returns what is known of a stage before it runs."""
  about = {"name": stage.name, "init_from": stage.init_from, "kind": "main" if stage.name in MAIN_LINE else "arm"}
  if stage.sweep:
    about["sweep"] = {"of": stage.sweep, "share": stage.share, "with": stage.average_with}
  return about


def describe_stage(stage: Stage, run: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Returns a stage's row of the report, with its curves."""
  folder = workdir / "stages" / stage.name
  records, measured = read_metrics(folder), read_validation(folder)
  return {
    **outline(stage),
    "steps": run["steps"],
    "tokens": run["tokens"],
    "seconds": round(run["seconds"], 1),
    "loss": [[r["step"], r["loss"]] for r in records if r["loss"] is not None],
    "task_loss": [[r["step"], r["task_loss"]] for r in records if "task_loss" in r],
    "task_gradients": [[r["step"], r["task_gradient_share"]] for r in records if "task_gradient_share" in r],
    "validation": [[r["step"], {name: s["value"] for name, s in r["skills"].items()}] for r in measured],
    "best": run.get("best"),
  }


def side_by_side(task: str, stages: Sequence[Stage], results: Results) -> list[dict[str, Any]]:
  """Joins the stages' outputs for a task's sample rows, as many as all stages kept (`config.evaluate.samples`)."""
  columns = {stage.name: results[stage.name]["samples"][task] for stage in stages}
  count = min(map(len, columns.values()))
  return [
    {**{key: row[key] for key in ("input", "target")}, "outputs": {name: c[i]["output"] for name, c in columns.items()}}
    for i, row in enumerate(next(iter(columns.values()))[:count])
  ]
