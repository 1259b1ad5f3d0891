"""What a run measures of itself as it goes: each task on its validation split, and which step is the best so far.

workdir/validation.jsonl    {"step", "skills": {task: {"metric", "value", "n", further numbers}}} each time

Measuring reads parameters and nothing else, so a run with it is the run without it, bit for bit. A checkpoint's record
says which step was measured last (`evaluated`) and which is the best (`best`), so that a run that goes on neither
leaves a measurement out nor has one twice.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from data.rows import hash_of
from data.tasks import Task, read_task_rows
from data.tokenizer import Tokenizer
from models import Model
from train.checkpoint import Checkpoints
from train.evaluate import evaluate_task
from train.evaluator import Evaluator
from train.guard import Watchdog
from train.log import Log
from train.meter import Meter
from train.metrics import DECODING, higher_is_better
from train.skills import asked_as
from train.step import State
from train.tuning import build_tuning


class Validation:
  """Measures a run's tasks, every so many steps and after the last one.

  Args:
    config: the resolved config; `config.train` says how often, on how many rows, and by what a step is the best.
    tasks: what is measured, from `check_validation`.
    model: the model.
    tokenizer: its tokenizer.
  """

  def __init__(self, config: ConfigDict, tasks: Mapping[str, Task], model: Model, tokenizer: Tokenizer):
    settings, self._tasks = config.train, tasks
    self._every, self._steps, self._best = settings.evaluate_every_steps, settings.steps, settings.best_metric
    self._model, self._tokenizer, self._tuning = model, tokenizer, build_tuning(config)
    self._config = config.copy_and_resolve_references()
    if settings.evaluate_max_examples:
      self._config.evaluate.max_examples = settings.evaluate_max_examples

  def due(self, step: int) -> bool:
    """Says whether the run is measured after a step."""
    return bool(self._every) and step > 0 and (step % self._every == 0 or step == self._steps)

  def owed(self, record: Mapping[str, Any]) -> bool:
    """Says whether the step that a run goes on from was saved before it could be measured."""
    return self.due(record["steps"]) and record.get("evaluated", 0) < record["steps"]

  def measure(
    self,
    step: int,
    state: State,
    record: dict[str, Any],
    *,
    log: Log,
    meter: Meter,
    watchdog: Watchdog,
    checkpoints: Checkpoints,
  ) -> dict[str, Any]:
    """Measures every task after a step that is done, and logs it; every process must call it.

    Args:
      step: its number.
      state: after it; only read.
      record: of the run so far.
      log: where it is recorded.
      meter: leaves out the time that it takes.
      watchdog: is told of each task.
      checkpoints: are told to keep the best step.

    Returns:
      The record with `evaluated`, and with `best` where `config.train.best_metric` is set: {"step", "skill", "value",
      "by": a hash of how and on what it was measured}.
    """
    merge = jax.jit(self._tuning.merge) if self._tuning.partial else self._tuning.merge
    skills = {}
    with meter.apart():
      evaluator = Evaluator(self._config, self._model, merge(state["params"], state["frozen"]), self._tokenizer)
      for name, task in self._tasks.items():
        watchdog.slow(f"evaluating {name} after step {step}")
        metrics = evaluate_task(evaluator, task, "validation").metrics
        skills[name] = {key: value for key, value in metrics.items() if isinstance(value, (str, int, float))}
    record = {**record, "evaluated": step}
    if self._best:
      record["best"] = self._better(record.get("best"), step, skills[self._best])
      checkpoints.pin(record["best"]["step"])
    log.validation(step, skills, record.get("best", {}).get("step"))
    return record

  def _better(self, best: Mapping[str, Any] | None, step: int, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the better of the best so far and a step; the earlier one where they are equal.

    A best that was found on other rows, or by another way of asking, cannot be compared: it is looked for anew.
    """
    settings, task, value = self._config.evaluate, self._tasks[self._best], found["value"]
    ways = {name: settings[name] for name in (*DECODING, "label_score", "max_examples")}
    by = {"metric": found["metric"], **ways, **asked_as(task, settings)}
    by = hash_of(read_task_rows(task, "validation").digest(), json.dumps(by, sort_keys=True))
    sign = 1 if higher_is_better(found["metric"]) else -1
    if best is not None and best.get("by", by) == by and sign * value <= sign * best["value"]:
      return best
    return {"step": step, "skill": self._best, "value": value, "by": by}


def check_validation(config: ConfigDict, tasks: Mapping[str, Task]) -> dict[str, Task]:
  """Checks what a config asks to be measured while it trains, before a long run.

  Args:
    config: `config.train` is read.
    tasks: by name.

  Returns:
    The tasks that are measured: those with a validation split; {} where nothing is.

  Raises:
    ValueError: a number below 0, no task with a validation split, a row in one that cannot be used, or a best metric
      that is not one of those tasks or is never measured.
  """
  settings = config.train
  for key in ("evaluate_every_steps", "evaluate_max_examples"):
    if settings[key] < 0:
      raise ValueError(f"config.train.{key} is {settings[key]}; expected a number of 0 or more")
  if not settings.evaluate_every_steps:
    if settings.best_metric:
      raise ValueError(
        f"config.train.best_metric is {settings.best_metric!r}, but config.train.evaluate_every_steps is 0, so that no "
        "step is ever measured; set it, such as to 100, or leave best_metric empty"
      )
    return {}
  measured = {name: task for name, task in tasks.items() if "validation" in task.files}
  if not measured:
    raise ValueError(
      f"config.train.evaluate_every_steps is {settings.evaluate_every_steps}, but none of the tasks {list(tasks)} has "
      "a validation split; add validation.jsonl beside a task's train.jsonl, or set it to 0"
    )
  if settings.best_metric and settings.best_metric not in measured:
    raise ValueError(
      f"config.train.best_metric is {settings.best_metric!r}; expected a task with a validation split: {list(measured)}"
    )
  for task in measured.values():
    read_task_rows(task, "validation")
  return measured
