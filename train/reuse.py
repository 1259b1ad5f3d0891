"""A stage that is there already, done or begun: is it what would be made, and measured, now?

What was trained stays good only for the parameters and texts that it was made of; what was measured, for the rows and
settings that it was measured with. Anything else is refused, and says what to delete: nothing is made anew unasked.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data.components import held_out_objective
from data.files import read_json
from data.tasks import Task
from train import processes, replay
from train.arms import Stage
from train.checkpoint import Checkpoints
from train.metrics import DECODING, headline
from train.skills import Skills
from train.stage import check_same_input, differences, find, identity


def stored_record(folder: Path) -> dict[str, Any] | None:
  """Returns the record of a stage's run, as far as it is; None where there is no step of it."""
  done = folder / "evaluation.json"
  if processes.agree(done.exists()):
    return read_json(done)["run"]
  if not processes.agree((folder / "checkpoints").is_dir()):
    return None
  with Checkpoints(folder) as checkpoints:
    newest = checkpoints.latest()
    return None if newest is None else checkpoints.restore_run(newest)


def check_made_of(
  run: Mapping[str, Any], config: ConfigDict, stage: Stage, input_now: Mapping[str, Any] | None, folder: Path
) -> None:
  """Refuses a stage, done or begun, that was made of other parameters or texts than those that are there now.

  Args:
    run: its record, as it was stored; an older version stored less: what it lacks is not compared.
    config: of the stage, now.
    stage: as it is planned now.
    input_now: the fingerprint of what it would train on now; None of an average.
    folder: of the stage.

  Raises:
    ValueError: says what differs, and what to delete.
  """
  if stage.average_with:
    then = run.get("averaged", {}).get("from")
    now = [identity(folder.parent / name) for name in (stage.average_with, stage.init_from)]
  else:
    then = now = run.get("base")
    with contextlib.suppress(FileNotFoundError):  # what a finished stage began with may be gone
      now = identity(find(config.init_from)) if config.init_from else {}
    both = (run.get("fingerprint", input_now), input_now)
    # What is sampled comes from `base`, which is compared; a stage that is done is the same in any order of tasks.
    free = (f"source.{replay.NAME}", "order")
    check_same_input(*({key: found[key] for key in found if key not in free} for found in both), folder)
  if then is not None and then != now:
    start = f"{stage.average_with} and {stage.init_from}" if stage.average_with else config.init_from or "scratch"
    raise ValueError(
      f"{folder} was made from other parameters than those of {start} now ({then} then, {now} now): delete that "
      "folder, and those of the stages that start from it, to make them anew; or put back what it was made from"
    )


def check_same_rows(result: Mapping[str, Any], stage: Stage, skills: Skills, where: Path) -> None:
  """Refuses an evaluation on other test rows than those of now, by other prompts, or of another average.

  Args:
    result: as it was stored; an older version stored no `rows` or `asked`: then they are not compared.
    stage: as it is planned now.
    skills: as they are now.
    where: the file that it was stored in, for the error.

  Raises:
    ValueError: says what differs.
  """
  for name, digest in skills.digests.items():
    if result.get("rows", {}).get(name, digest) != digest:
      raise ValueError(
        f"{where} measured {name!r} on other test rows than those of now (the files, or which rows are measured, have "
        "changed): stages could not be compared row by row; delete that file in every stage to measure again (nothing "
        "is trained again), or put the rows back"
      )
  now = {name: skills.asked[name] for name in result.get("asked", {}) if name in skills.asked}
  if lines := differences({name: result["asked"][name] for name in now}, now):
    raise ValueError(
      f"{where} measured tasks that were asked otherwise than now:\n  " + "\n  ".join(lines) + "\nstages could not be "
      "compared row by row; delete that file in every stage to measure again (nothing is trained again), or put it back"
    )
  if missing := [name for name in skills.texts if name not in result["skills"]]:
    raise ValueError(f"{where} lacks {missing}; delete that file to measure again (nothing is trained again)")
  then = result["run"].get("averaged", {}).get("with", "")
  if then != stage.average_with:
    raise ValueError(
      f"{where} measured an average with {then!r}, {stage.average_with!r} is asked for now; delete its folder"
    )


def check_measured(skills: Mapping[str, Any], tasks: Mapping[str, Task], config: ConfigDict, where: Path) -> None:
  """Refuses an evaluation that does not hold what is asked for now.

  Args:
    skills: metrics by skill, as they were stored.
    tasks: by name, as they are now.
    config: `evaluate` is read.
    where: the file that they were stored in, for the error.

  Raises:
    ValueError: a task was not measured, or by another headline, label score, target accuracy or way of answering; or
      a perplexity under another objective.
  """
  settings, objective = config.evaluate, held_out_objective(config)
  measured = {}  # skill -> how it was, and is, measured
  for name, found in skills.items():
    if "perplexity" in found:  # an older version did not store its objective
      measured[name] = {"objective": found.get("objective", objective)}, {"objective": objective}
  for name, task in tasks.items():
    found = skills.get(name, {})
    then = {"metric": found.get("metric")}
    now: dict[str, Any] = {"metric": headline(task.kind, task.metrics)}
    if task.kind == "classification":
      fitted = found.get("calibration", {})
      then |= {key: fitted.get(key) for key in ("label_score", "target_accuracy")}
      now |= {"label_score": task.label_score or settings.label_score, "target_accuracy": settings.target_accuracy}
    if task.kind == "generation":
      then |= {name: found.get(name, plain) for name, plain in DECODING.items()}
      now |= {name: settings[name] for name in DECODING}
    measured[name] = then, now
  for name, (then, now) in measured.items():
    if then != now:
      raise ValueError(
        f"{where} measured {name!r} with {then}, and {now} is asked for now; delete that file to measure again "
        "(nothing is trained again), or ask for what it has"
      )
