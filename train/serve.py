"""A trained model, loaded to be asked from the command line."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data.cache import cache_folder
from data.prompts import render, template_fields
from data.sources import open_rows
from data.tasks import Task
from models.sharding import make_mesh
from train import stage
from train.evaluate import Evaluator
from train.loop import build_model


class Loaded(NamedTuple):
  """A model ready to be asked.

  Attributes:
    folder: the stage it comes from.
    evaluator: classifies and generates.
    tasks: the tasks it knows.
  """

  folder: Path
  evaluator: Evaluator
  tasks: Mapping[str, Task]

  def task(self, name: str, kind: str | None = None) -> Task:
    """Returns a task.

    Raises:
      ValueError: unknown, or of another kind.
    """
    known = [task.name for task in self.tasks.values() if kind in (None, task.kind)]
    if name not in known:
      raise ValueError(f"--task={name}: the model in {self.folder} knows {known}" + (f" for {kind}" if kind else ""))
    return self.tasks[name]

  def prompt(self, task: Task | None, row: Mapping[str, str], template: int = 0) -> str:
    """Puts a row into one of the task's templates; without a task its `input` is the prompt.

    Raises:
      ValueError: there is no such template, or it needs a field that the row lacks.
    """
    if task is None:
      return row["input"]
    if not 0 <= template < len(task.templates):
      raise ValueError(f"--template={template}: task {task.name!r} has {len(task.templates)}, numbered from 0")
    missing = set(template_fields(task.templates[template]["input"], task.name)) - {*row, "task", "instruction"}
    if missing:
      raise ValueError(f"task {task.name!r} needs the fields {sorted(missing)}, the input has {sorted(row)}")
    return render(task, row, template)[0]


@contextlib.contextmanager
def load(folder: str) -> Iterator[Loaded]:
  """Loads a model onto all devices, for the duration of the `with` block.

  Args:
    folder: a run's workdir or a stage in it.
  """
  where = stage.find(folder)
  config, tokenizer = stage.read_config(where), stage.read_tokenizer(where)
  with config.unlocked():
    # Rows split over all devices; the configured training mesh may not fit this machine.
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    devices = jax.device_count()
    config.evaluate.batch_size = -(-config.evaluate.batch_size // devices) * devices
  mesh, model = make_mesh(config.mesh), build_model(config, tokenizer)
  with jax.set_mesh(mesh):
    evaluator = Evaluator(config, model, stage.load_params(where, model, mesh), tokenizer)
    yield Loaded(where, evaluator, stage.read_tasks(where))


def read_requests(text: str | None, file: str | None, flag: str) -> list[dict[str, Any]]:
  """Returns the rows to answer: one text, or the rows of a file.

  Raises:
    ValueError: both or neither are given, or a line has no `input`.
  """
  if (text is None) == (file is None):
    raise ValueError(f"give either {flag} or --input=FILE.jsonl")
  if text is not None:
    return [{"input": text}]
  rows = open_rows(file, cache_folder(""))
  for number, row in enumerate(rows):
    if not isinstance(row.get("input"), str):
      raise ValueError(f'{rows.where(number)}: expected {{"input": "…"}}, got {sorted(row)}')
  return list(rows)


def label(task: Task, scores: np.ndarray) -> dict[str, Any]:
  """Turns log-probabilities of label texts into the best label and a probability for each (softmax)."""
  odds = np.exp(scores - scores.max())
  probabilities = {name: float(p) for name, p in zip(task.labels, odds / odds.sum(), strict=True)}
  return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def write_answers(answers: Sequence[Mapping[str, Any]], file: str | None) -> None:
  """Writes JSON lines to a file, or to the terminal."""
  text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
  if file is None:
    sys.stdout.write(text)
  else:
    Path(file).write_text(text, encoding="utf-8")
    print(f"wrote {len(answers)} answers to {file}")
