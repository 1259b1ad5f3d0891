"""A trained model, loaded to be asked from the command line."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data.cache import cache_folder
from data.prompts import prompt_of, template_fields
from data.sources import open_rows
from data.tasks import Task
from models.sharding import make_mesh
from train import calibration, label_sets, stage
from train.calibration import Calibration, LabelSets
from train.evaluator import Evaluator
from train.loop import build_model


class Loaded(NamedTuple):
  """A model ready to be asked.

  Attributes:
    folder: the stage it comes from.
    evaluator: classifies and generates.
    tasks: the tasks it knows.
    calibrations: of the tasks that the recipe evaluated.
  """

  folder: Path
  evaluator: Evaluator
  tasks: Mapping[str, Task]
  calibrations: Mapping[str, Calibration | LabelSets]

  def task(self, name: str, kinds: Sequence[str] = ()) -> Task:
    """Returns a task; `kinds` are those that will do, none = all.

    Raises:
      ValueError: unknown, or of another kind.
    """
    known = [task.name for task in self.tasks.values() if not kinds or task.kind in kinds]
    if name not in known:
      raise ValueError(
        f"--task={name}: the model in {self.folder} knows {known}" + (f" for {kinds[0]}" if kinds else "")
      )
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
    needed = set(template_fields(task.templates[template]["input"], task.name)) - {"task", "instruction"}
    if missing := {name for name in needed if not isinstance(row.get(name), str)}:
      has = {name: type(value).__name__ for name, value in row.items()}
      raise ValueError(f"task {task.name!r} needs the fields {sorted(missing)} as strings, the input has {has}")
    return prompt_of(task, row, template)

  def say_cut(self) -> None:
    """Says on stderr how many prompts were cut, if some were."""
    if self.evaluator.cut:
      count, row = len(self.evaluator.cut), self.evaluator.row
      print(f"{count} prompts were cut: with the answer they are longer than rows of {row} tokens", file=sys.stderr)

  def classify(self, task: Task, prompts: Sequence[str], template: int = 0) -> list[dict[str, Any]]:
    """Labels prompts as they were labelled when the model was evaluated; see `label`.

    Args:
      task: a classification task; of one with several labels a text see `label_sets.answers`.
      prompts: from `prompt`.
      template: which of the task's templates they are of.

    Raises:
      ValueError: several labels a text, and the stage was not evaluated: which sets to score is not known.
    """
    if task.kind == "multi_label":
      if task.name not in self.calibrations:
        raise ValueError(
          f"{self.folder / 'calibration.json'} says nothing of task {task.name!r}, whose texts have several labels: "
          "the recipe writes it when it evaluates a stage; delete evaluation.json there and run it"
        )
      return label_sets.answers(self.evaluator, task, prompts, template, self.calibrations[task.name])
    plain = Calibration(task.label_score or self.evaluator.config.evaluate.label_score)
    found = self.calibrations.get(task.name, plain)
    scores = self.evaluator.label_scores(task, prompts, template)[found.label_score]
    return [label(task, score, found) for score in scores]


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
    config.mesh.update({"data": -1, "fsdp": 1, "context": 1, "tensor": 1, "slices": 0})
    config.model.update({"attention": "auto", "attention_block": 0})  # nor may the path that training took
  mesh, model = make_mesh(config.mesh), build_model(config, tokenizer)
  with jax.set_mesh(mesh):
    evaluator = Evaluator(config, model, stage.load_params(where, model, mesh), tokenizer)
    yield Loaded(where, evaluator, stage.read_tasks(where), calibration.read(where / "calibration.json"))


def check_output(file: str | None) -> None:
  """Makes the folder of a file that will be written, before the work whose answers it is for; None: the terminal.

  Raises:
    OSError: it could not be written.
  """
  if file is None:
    return
  folder = Path(file).parent
  folder.mkdir(parents=True, exist_ok=True)
  if Path(file).is_dir() or not os.access(file if Path(file).exists() else folder, os.W_OK):
    raise PermissionError(f"--output={file} cannot be written; name a file in a folder that you may write to")


def read_requests(text: str | None, file: str | None, flag: str) -> list[dict[str, Any]]:
  """Returns the rows to answer: one text, or the rows of a file.

  Raises:
    ValueError: both or neither are given, or a row has no `input`, or holds what an answer's JSON could not.
  """
  if (text is None) == (file is None):
    raise ValueError(f"give either {flag} or --input=FILE.jsonl")
  if text is not None:
    return [{"input": text}]
  rows = open_rows(file, cache_folder(""))
  for number, row in enumerate(rows):
    if not isinstance(row.get("input"), str):
      raise ValueError(f'{rows.where(number)}: expected {{"input": "…"}}, got {sorted(row)}')
    try:
      json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
      what = f"a row is kept beside its answer, and this one is no JSON ({error}); take the field out or mend it"
      raise ValueError(f"{rows.where(number)}: {what}") from error
  return list(rows)


def label(task: Task, scores: np.ndarray, fitted: Calibration) -> dict[str, Any]:
  """Turns one text's label scores into an answer.

  Args:
    task: a classification task.
    scores: float64 [labels], of the kind `fitted.label_score`.
    fitted: the task's calibration.

  Returns:
    `label`, the best one; `probabilities` of all; and where there is a threshold `abstain`: whether the best label's
    probability is below it.
  """
  shares = fitted.probabilities(scores)
  answer = {"label": task.labels[int(shares.argmax())]}
  answer["probabilities"] = dict(zip(task.labels, shares.tolist(), strict=True))
  if fitted.threshold is not None:
    answer["abstain"] = bool(shares.max() < fitted.threshold)
  return answer


def write_answers(answers: Sequence[Mapping[str, Any]], file: str | None) -> None:
  """Writes JSON lines to a file, or to the terminal."""
  text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
  if file is None:
    sys.stdout.write(text)
  else:
    Path(file).write_text(text, encoding="utf-8")
    print(f"wrote {len(answers)} answers to {file}")
