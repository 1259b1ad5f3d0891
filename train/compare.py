"""Several finished recipe runs side by side: values, what differs in their settings, and paired tests.

A stage of a run is compared with the stage of the same name of the first run, skill by skill. Where both were measured
on the same test rows (evaluation.json holds a hash of them), the difference is tested on those rows as in a run's own
report. Where they were not, or where it is not known, the values stand beside each other, nothing is said about their
difference, and the reason is given.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.files import read_json
from train.recipe import read_scores
from train.report_verdict import number, p_value
from train.report_words import AGAINST
from train.retention import compare_values, same_examples
from train.stage import MAIN_LINE, flat, stored_settings

_PLACES = ("data.cache_dir", "processes.")  # settings that say where, not what
_SHOWN = ("value", "interval", "n", "bits_per_byte")


class Run(NamedTuple):
  """A finished run, as it lies on disk.

  Attributes:
    name: of the run, in the comparison.
    folder: its workdir.
    report: see `train/report.py`.
    scores: stage -> skill -> parts, see `train/retention.py`.
    rows: stage -> skill -> hash of the test rows; nothing where an earlier version measured it.
    settings: stage -> dotted key -> value.
  """

  name: str
  folder: Path
  report: Mapping[str, Any]
  scores: Mapping[str, Mapping[str, np.ndarray]]
  rows: Mapping[str, Mapping[str, str]]
  settings: Mapping[str, Mapping[str, Any]]


def compare_runs(folders: Sequence[str]) -> dict[str, Any]:
  """Compares runs with the first one.

  Args:
    folders: workdirs of `argot recipe`.

  Returns:
    See `comparison_of`.

  Raises:
    ValueError: fewer than two runs, one that comes twice, or runs without a skill in common.
    FileNotFoundError: a folder that holds no finished run.
  """
  places = [Path(folder) for folder in folders]
  if len(places) < 2 or len({place.resolve() for place in places}) < len(places):
    raise ValueError(f"expected two or more different runs to compare, got {[str(folder) for folder in folders]}")
  short = len({place.resolve().name for place in places}) == len(places)
  return comparison_of([read_run(place, place.resolve().name if short else str(place)) for place in places])


def comparison_of(runs: Sequence[Run]) -> dict[str, Any]:
  """Compares runs with the first one.

  Returns:
    "runs": [{"name", "folder", "domain", "architecture", "size", "parameters", "created", "gate"}]
    "stages": names; "skills": those that all runs have, as in a report
    "values": {stage: {skill: {run: {"value", "interval", "n", "bits_per_byte"}}}}
    "changes": {run: {stage: {skill: change}}}, see `retention.changes`, `from` the first run
    "unlike": {run: {skill: why it is not tested}}
    "settings": [{"key", "stages", "values": {run: value}}]

  Raises:
    ValueError: no skill in common.
  """
  skills = _skills(runs)
  stages = list(dict.fromkeys(stage["name"] for run in runs for stage in run.report["stages"]))
  unlike = {run.name: _unlike(runs[0], run, skills) for run in runs[1:]}
  return {
    "runs": [_about(run) for run in runs],
    "stages": stages,
    "skills": skills,
    "values": {stage: {skill["name"]: _values(runs, stage, skill["name"]) for skill in skills} for stage in stages},
    "changes": {run.name: _changes(runs[0], run, skills, unlike[run.name]) for run in runs[1:]},
    "unlike": unlike,
    "settings": settings_that_differ({run.name: run.settings for run in runs}),
  }


def read_run(folder: Path, name: str) -> Run:
  """Reads a finished run.

  Raises:
    FileNotFoundError: there is none, or its stages are gone.
  """
  file = folder / "report.json"
  if not file.exists():
    raise FileNotFoundError(f"{file} is missing: expected the workdir of a run that `argot recipe` has finished")
  report = read_json(file)
  scores, rows, settings = {}, {}, {}
  for stage in (stage["name"] for stage in report["stages"]):
    place = folder / "stages" / stage
    if not (place / "evaluation.json").exists():
      raise FileNotFoundError(f"{place / 'evaluation.json'} is missing: run the recipe again, which measures the stage")
    scores[stage] = read_scores(place)
    evaluation = read_json(place / "evaluation.json")
    rows[stage], asked = evaluation.get("rows", {}), evaluation.get("asked", {})
    settings[stage] = stored_settings(place)
    settings[stage] |= flat({f"task {name}": how for name, how in asked.items()})  # of tasks.json: not in the config
    if stage != MAIN_LINE[-1]:
      del settings[stage]["init_from"]  # a place in the run's own folder; that of its first stage is what it began with
  return Run(name, folder, report, scores, rows, settings)


def settings_that_differ(settings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Lists the settings that are not the same in all runs.

  Args:
    settings: run -> stage -> dotted key -> value; stages that not all have are left out, and so are mere places.

  Returns:
    [{"key", "stages", "values": {run: value}}]: the stages in which the runs' values are these; None is not set.

  Example:
    >>> settings_that_differ({"a": {"base": {"seed": 0}}, "b": {"base": {"seed": 1}}})
    [{'key': 'seed', 'stages': ['base'], 'values': {'a': 0, 'b': 1}}]
  """
  stages = [stage for stage in next(iter(settings.values())) if all(stage in found for found in settings.values())]
  keys = {key for found in settings.values() for stage in stages for key in found[stage]}
  rows = []
  for key in sorted(key for key in keys if not key.startswith(_PLACES)):
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
      values = {run: of[stage].get(key) for run, of in settings.items()}
      if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
        found.setdefault(json.dumps(values), {"key": key, "stages": [], "values": values})["stages"].append(stage)
    rows += found.values()
  return rows


def lines(comparison: Mapping[str, Any]) -> list[str]:
  """Returns the comparison of the last stage of the main line that all runs have, in lines for the terminal."""
  first, *others = [run["name"] for run in comparison["runs"]]
  count = len(others) + 1
  common = [name for name, row in comparison["values"].items() if all(len(found) == count for found in row.values())]
  stage = next((name for name in MAIN_LINE if name in common), None)
  said = []
  for skill in comparison["skills"] if stage else ():
    values = comparison["values"][stage][skill["name"]]
    for run in others:
      ours, theirs = (number(values[name]["value"]) for name in (first, run))
      shown = f"{stage}, {skill['name']}: {first} {ours}, {run} {theirs}"
      said.append(f"{shown}: {_outcome(comparison, run, stage, skill['name'])}")
  return [*said, f"settings that differ: {len(comparison['settings'])}"]


def _outcome(comparison: Mapping[str, Any], run: str, stage: str, skill: str) -> str:
  change = comparison["changes"][run].get(stage, {}).get(skill)
  if not change:
    return f"not tested: {comparison['unlike'][run].get(skill, 'not measured')}"
  p = f", {p_value(change['p'])}" if "p" in change else ""
  return f"{AGAINST.get(change['verdict'], change['verdict'])}{p}"


def _skills(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
  """Returns the skills that all runs have, as the first one lists them."""
  listed = [[skill["name"] for skill in run.report["skills"]] for run in runs]
  common = [skill for skill in runs[0].report["skills"] if all(skill["name"] in names for names in listed)]
  if not common:
    found = "; ".join(f"{run.folder}: {', '.join(names)}" for run, names in zip(runs, listed, strict=True))
    raise ValueError(f"the runs have no skill in common ({found}): they cannot be compared")
  return common


def _unlike(first: Run, run: Run, skills: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Returns skill -> why two runs' values of it are not tested against each other."""
  theirs = {skill["name"]: skill for skill in run.report["skills"]}
  found = {}
  for skill in skills:
    name = skill["name"]
    other, stages = theirs[name], [stage for stage in first.rows if stage in run.rows]
    differ = [key for key in ("kind", "metric", "labels") if skill.get(key) != other.get(key)]
    rows = [(first.rows[stage].get(name), run.rows[stage].get(name)) for stage in stages]
    parts = [[of.scores[stage].get(name) for of in (first, run)] for stage in stages]
    if differ:
      found[name] = f"it has another {' and '.join(differ)}: " + "; ".join(
        f"{key} {skill.get(key)} and {other.get(key)}" for key in differ
      )
    elif any(None in pair for pair in rows):
      found[name] = "which test rows they were is not known: an earlier version measured one of the two"
    elif any(ours != others for ours, others in rows):
      found[name] = "it was measured on other test rows"
    elif any(one is None or two is None or not same_examples(skill, one, two) for one, two in parts):
      found[name] = "the same text is cut into other tokens or rows (tokenizer, objective, lengths or templates differ)"
  return found


def _changes(
  first: Run, run: Run, skills: Sequence[Mapping[str, Any]], unlike: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Any]]]:
  result: dict[str, dict[str, dict[str, Any]]] = {}
  for stage in run.scores:
    before, after = (of.report.get("matrix", {}).get(stage, {}) for of in (first, run))
    for skill in skills:
      name = skill["name"]
      if name in unlike or name not in before or name not in after:
        continue
      parts = first.scores[stage].get(name), run.scores[stage].get(name)
      change = compare_values(before[name].get("value"), after[name].get("value"), skill, *parts)
      result.setdefault(stage, {})[name] = {"from": first.name, **change}
  return result


def _values(runs: Sequence[Run], stage: str, skill: str) -> dict[str, dict[str, Any]]:
  found = {run.name: run.report.get("matrix", {}).get(stage, {}).get(skill) for run in runs}
  return {name: {key: entry[key] for key in _SHOWN if key in entry} for name, entry in found.items() if entry}


def _about(run: Run) -> dict[str, Any]:
  named = {key: run.report.get(key) for key in ("domain", "architecture", "size", "parameters", "created")}
  return {"name": run.name, "folder": str(run.folder), **named, "gate": run.report.get("gate", {}).get("passed")}
