"""Tasks and the domain folder.

corpus.jsonl               {"text": …} a line: unlabelled documents of the domain
corpus_validation.jsonl    optional; else every 20th document of the corpus is held out
tasks.json                 {"NAME": {"kind": "classification" or "generation", "instruction": …,
                            "labels": […] (classification), "templates": [{"input": …, "target": …}] (optional),
                            "multi_label": true (optional; classification: a text has any number of the labels),
                            "none": "none", "separator": "|" (optional, with it: see data/label_sets.py),
                            "chat": true (optional: in the tokenizer's chat template),
                            "label_score": "sum", "mean" or "pmi" (optional; classification),
                            "metrics": ["chrf", …] (optional; generation: what is measured, the headline first),
                            "train", "validation", "test": sources (optional), see data/sources.py,
                            "rows": anything (optional; for the reader)}}
NAME/{train,validation,test}.jsonl    {"input": …, "target": …} a line, and any further string fields; a target is a
                                      label, a text, or with "multi_label" a list of labels

Each file may have any other form that `data/rows.py` reads, such as corpus.parquet or NAME/train.csv.gz.
"""

import dataclasses
import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import cache_folder
from data.files import SUFFIXES
from data.label_sets import JOINT, target_of
from data.prompts import template_fields
from data.rows import BadRow, Chosen, Row, Rows
from data.sources import Source, Texts, check_text, open_rows, open_texts, string_field

KINDS = ("classification", "generation")
SPLITS = ("train", "validation", "test")
DEFAULT_TEMPLATE = {"input": "{task}: {instruction}\n{input}", "target": "{target}"}
HOLD_OUT = 20  # every 20th document, where a domain has no corpus_validation.jsonl
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SAME_IN_ALL_ROWS = {"target", "task", "instruction"}  # so that every label can be scored as the answer to any row
RESERVED = ("general", "domain", "tasks", "replay", "packing")  # other names in a mixture, and beside it in a report
FIELDS = ("name", "kind", "instruction", "labels", "templates", "multi_label", "none", "separator", "chat", "rows")
FIELDS += ("label_score", "metrics", *SPLITS, "files")
MEASURED = ("label_score", "metrics")  # fields of a task that shape its evaluation alone, not what is learned


@dataclasses.dataclass(frozen=True)
class Task:
  """A job the model learns, told from the others by its prompt.

  Attributes:
    name: also the prompt's prefix.
    kind: "classification", "generation" or "multi_label": a classification where a text has any number of labels.
    instruction: what to do, in words.
    labels: classification, multi_label: every label, as text.
    templates: how a row becomes (input, target); `{field}` names a field of the row, `{task}` or `{instruction}`.
    chat: prompt and answer are the messages of the tokenizer's chat template.
    files: split -> source of its rows, see `data/sources.py`.
    label_score: classification: how labels are scored, see `train/calibration.py`; "" = `config.evaluate.label_score`.
    metrics: generation: names in `train/text_metrics.py`, the headline first; none = all, ROUGE-L first.
    none: multi_label: the answer where a text has no label.
    separator: multi_label: stands between labels where a row has them as text.
    cache: `config.data.cache_dir`.
    bad_rows: what becomes of a row that cannot be used: "error" or "skip".
  """

  name: str
  kind: str
  instruction: str
  labels: tuple[str, ...] = ()
  templates: tuple[Mapping[str, str], ...] = (DEFAULT_TEMPLATE,)
  chat: bool = False
  files: Mapping[str, Source] = dataclasses.field(default_factory=dict)
  label_score: str = ""
  metrics: tuple[str, ...] = ()
  none: str = "none"
  separator: str = "|"
  cache: str = ""
  bad_rows: str = "error"

  def as_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON-able values; `from_dict` reads them."""
    names = ("name", "kind", "instruction", "chat", "files", *MEASURED)
    fields = {name: getattr(self, name) for name in names}
    lists = {"labels": list(self.labels), "metrics": list(self.metrics)}
    if self.kind == "multi_label":
      lists |= {"kind": "classification", "multi_label": True, "none": self.none, "separator": self.separator}
    return {**fields, **lists, "templates": [dict(template) for template in self.templates]}

  def asked(self) -> dict[str, Any]:
    """Returns the fields, as `as_dict` does, that shape prompts and answers: what is learned, and how it is asked."""
    return {name: value for name, value in self.as_dict().items() if name not in ("files", *MEASURED)}

  @staticmethod
  def from_dict(name: str, fields: Mapping[str, Any], where: str = "task") -> "Task":
    """Makes a task from the fields of `tasks.json` or of a config.

    Raises:
      ValueError: a field is missing or malformed; `where` says which file.
    """
    where = f"{where}: task {name!r}"
    if unknown := sorted(set(fields) - set(FIELDS)):
      near = difflib.get_close_matches(unknown[0], FIELDS, 1)
      raise ValueError(
        f"{where} has unknown {unknown}{f' (is {near[0]!r} meant?)' if near else ''}; known are {list(FIELDS)}"
      )
    if not NAME.fullmatch(name) or name in RESERVED:
      raise ValueError(f"{where}: a name is letters, digits, '_' and '-', and not one of {RESERVED}")
    kind, labels = fields.get("kind"), fields.get("labels") or ()
    if kind not in KINDS:
      raise ValueError(f"{where}: `kind` must be one of {KINDS}, got {kind!r}")
    if not _is_list(labels) or not all(isinstance(label, str) and label for label in labels):
      raise ValueError(f"{where}: `labels` must be a list of non-empty strings, got {labels!r}")
    if kind == "classification" and (len(labels) < 2 or len(set(labels)) < len(labels)):
      raise ValueError(f"{where}: classification needs at least two different `labels`, got {list(labels)}")
    templates = _templates(fields, kind, where)
    instruction, chat = fields.get("instruction", ""), fields.get("chat", False)
    if not isinstance(instruction, str):
      raise ValueError(f"{where}: `instruction` must be a string, got {instruction!r}")
    if not isinstance(chat, bool):
      raise ValueError(f"{where}: `chat` must be true or false, got {chat!r}")
    files = {split: fields[split] for split in SPLITS if fields.get(split)} or fields.get("files") or {}
    if not isinstance(files, Mapping) or set(files) - set(SPLITS):
      raise ValueError(f"{where}: `files` must be an object of {SPLITS}, got {files!r}")
    score, metrics = fields.get("label_score", ""), fields.get("metrics") or ()
    if not isinstance(score, str):
      raise ValueError(f"{where}: `label_score` must be a string, got {score!r}")
    if not _is_list(metrics) or not all(isinstance(name, str) for name in metrics):
      raise ValueError(f"{where}: `metrics` must be a list of names, got {metrics!r}")
    several = _multi_label(fields, kind, labels, where)
    task = Task(name, kind, instruction, tuple(labels), templates, chat, dict(files), score, tuple(metrics))
    return dataclasses.replace(task, **several)


def _is_list(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def _templates(fields: Mapping[str, Any], kind: str, where: str) -> tuple[dict[str, str], ...]:
  """Returns a task's templates.

  Raises:
    ValueError: one is malformed, or those of labels name what differs from row to row.
  """
  templates = fields.get("templates") or (DEFAULT_TEMPLATE,)
  if not _is_list(templates):
    raise ValueError(f"{where}: `templates` must be a list of objects, got {templates!r}")
  for template in templates:
    if not isinstance(template, Mapping):
      raise ValueError(f"{where}: a template must be an object with `input` and `target`, got {template!r}")
    if set(template) != {"input", "target"}:
      raise ValueError(f"{where}: a template has exactly `input` and `target`, got {sorted(template)}")
    for text in template.values():
      template_fields(text, where)
    if kind == "classification" and (others := set(template_fields(template["target"], where)) - _SAME_IN_ALL_ROWS):
      raise ValueError(
        f"{where}: the `target` of a label's template may name {sorted(_SAME_IN_ALL_ROWS)}, got {others}"
      )
  return tuple(dict(template) for template in templates)


def _multi_label(fields: Mapping[str, Any], kind: str, labels: Sequence[str], where: str) -> dict[str, str]:
  """Returns what a task of several labels a text has of its own; {} of another.

  Raises:
    ValueError: a field is malformed, or a label could not be told apart in an answer.
  """
  several, words = fields.get("multi_label", False), {}
  if not isinstance(several, bool):
    raise ValueError(f"{where}: `multi_label` must be true or false, got {several!r}")
  for key, default in (("none", "none"), ("separator", "|")):
    words[key] = fields.get(key, default)
    if not several and key in fields:
      raise ValueError(f"{where}: `{key}` is for tasks with `multi_label`: true; leave it out")
    if not isinstance(words[key], str) or not words[key].strip():
      raise ValueError(f"{where}: `{key}` must be a non-empty string, got {words[key]!r}")
  if not several:
    return {}
  if kind != "classification":
    raise ValueError(f"{where}: `multi_label` is for classification, this is {kind}; leave it out")
  for label in labels:
    if JOINT.strip() in label or words["separator"] in label or label == words["none"] or label != label.strip():
      raise ValueError(
        f"{where}: with `multi_label` a label holds no {JOINT.strip()!r} and no {words['separator']!r} (`separator`), "
        f"is not {words['none']!r} (`none`), and has no white space around it; got {label!r}"
      )
  return {"kind": "multi_label", **words}


@dataclasses.dataclass(frozen=True)
class Domain:
  """A field's unlabelled text and tasks.

  Attributes:
    name: for the report.
    corpus: training documents.
    corpus_test: held-out documents, for perplexity.
    tasks: by name.
  """

  name: str
  corpus: Texts
  corpus_test: Texts
  tasks: Mapping[str, Task]


def load_domain(
  folder: str | Path, more_tasks: Mapping[str, Any] | None = None, cache_dir: str = "", bad_rows: str = "error"
) -> Domain:
  """Opens a domain folder; see the top of this file. Every row of a task is checked.

  Args:
    folder: the folder.
    more_tasks: `config.tasks`: further tasks, with their sources.
    cache_dir: `config.data.cache_dir`.
    bad_rows: what becomes of rows that cannot be used: "error" or "skip".

  Raises:
    FileNotFoundError: a part is missing.
    ValueError: a part is malformed; names file, line and what to do.
  """
  folder, cache = Path(folder), cache_folder(cache_dir)
  if not folder.is_dir():
    raise FileNotFoundError(f"domain folder {folder} is missing; its form is described in README, 'Your own domain'")
  file, held_out_file = data_file(folder, "corpus"), data_file(folder, "corpus_validation")
  if file is None:
    raise FileNotFoundError(f"{folder / 'corpus.jsonl'} is missing: it holds the domain's text, or corpus{SUFFIXES}")
  corpus = open_texts(file, cache, bad_rows)
  if held_out_file:
    held_out = open_texts(held_out_file, cache, bad_rows)
  else:
    corpus, held_out = hold_out(corpus, file)
  tasks = {name: folder_task(folder, name, fields) for name, fields in task_table(folder).items()}
  tasks |= {name: Task.from_dict(name, fields, "config.tasks") for name, fields in (more_tasks or {}).items()}
  tasks = {name: dataclasses.replace(task, cache=cache_dir, bad_rows=bad_rows) for name, task in tasks.items()}
  return Domain(folder.resolve().name, corpus, held_out, {name: check_task(task) for name, task in tasks.items()})


def data_file(folder: Path, stem: str) -> str | None:
  """Returns the file of a folder that has this name before its suffix; None where there is none.

  Raises:
    ValueError: several.
  """
  found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
  if len(found) > 1:
    raise ValueError(f"{folder} holds {[file.name for file in found]}; expected one of them")
  return str(found[0]) if found else None


def hold_out(texts: Texts, where: str) -> tuple[Texts, Texts]:
  """Splits documents: every `HOLD_OUT`-th is held out, of fewer the last.

  Args:
    texts: the documents.
    where: they come from, for the error.

  Raises:
    ValueError: a single document, of which none can be held out.

  Example:
    >>> from data.sources import texts_of
    >>> [len(part) for count in (40, 3) for part in hold_out(texts_of(["text"] * count), "here")]
    [38, 2, 2, 1]
  """
  if len(texts) == 1:
    raise ValueError(
      f"{where} is one document, and none is left to measure perplexity on: cut it into several (for a domain's corpus "
      "corpus_validation.jsonl may hold others)"
    )
  numbers = np.arange(len(texts))
  held = numbers % HOLD_OUT == HOLD_OUT - 1 if len(texts) >= HOLD_OUT else numbers == len(texts) - 1
  return texts.choose(numbers[~held]), texts.choose(numbers[held])


def task_table(folder: Path) -> dict[str, dict[str, Any]]:
  """Reads `tasks.json`: the fields of each task, not checked yet.

  Raises:
    FileNotFoundError: it is missing.
    ValueError: it is not an object of objects.
  """
  file = folder / "tasks.json"
  if not file.exists():
    raise FileNotFoundError(
      f"{file} is missing: it names the domain's tasks, such as "
      '{"urgency": {"kind": "classification", "instruction": "…", "labels": ["a", "b"]}}'
    )
  try:
    parsed = json.loads(file.read_text(encoding="utf-8-sig"))
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{file}: not JSON in UTF-8 ({error})") from error
  if not isinstance(parsed, dict) or not all(isinstance(fields, dict) for fields in parsed.values()):
    raise ValueError(f'{file}: expected an object of objects, {{"NAME": {{"kind": …}}}}')
  return parsed


def folder_task(folder: Path, name: str, fields: Mapping[str, Any]) -> Task:
  """Makes a task of `tasks.json`, with the files that lie in its folder.

  Raises:
    ValueError: see `Task.from_dict`.
  """
  task = Task.from_dict(name, fields, str(folder / "tasks.json"))  # checks the name before it becomes a path
  files = {split: data_file(folder / name, split) for split in SPLITS}
  return dataclasses.replace(task, files={split: file for split, file in files.items() if file} | dict(task.files))


def check_task(task: Task) -> Task:
  """Reads every row of a task once.

  Raises:
    FileNotFoundError: no train or no test rows.
    ValueError: a malformed row, or a label that `labels` lacks; with file and line.
  """
  for split in ("train", "test"):
    if split not in task.files:
      raise FileNotFoundError(f"task {task.name!r} has no {split} split: expected {task.name}/{split}.jsonl")
  for split in task.files:
    for _ in read_task_rows(task, split):
      pass
  return task


class TaskRows(Rows):
  """Rows of a split, checked when they are read: `input`, `target` and any further string fields.

  Attributes:
    skipped: reason -> rows that were passed over.
  """

  def __init__(self, task: Task, rows: Rows):
    self._task, self._rows, self.skipped = task, rows, Counter()
    texts = [text for template in task.templates for text in template.values()]
    self._needed = {name for text in texts for name in template_fields(text, task.name)} - {"task", "instruction"}
    if task.bad_rows == "skip":
      self._rows = Chosen(rows, [number for number in range(len(rows)) if self._usable(number)])

  def _usable(self, number: int) -> bool:
    try:
      self.read(number)
    except BadRow as error:
      self.skipped[error.reason] += 1
      return False
    return True

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, number: int) -> Row:
    row, task = self._rows.read(number), self._task
    try:
      string_field(row, "input")
      if task.kind == "multi_label":
        row = {**row, "target": target_of(row.get("target"), task.labels, task.none, task.separator)}
      elif string_field(row, "target") not in (task.labels or (row["target"],)):
        fix = "add it to tasks.json or mend the row"
        raise ValueError(f"the label is none of {list(task.labels)}, got {row['target']!r}; {fix}")
      fields = {key: value for key, value in row.items() if isinstance(value, str)}
      if missing := self._needed - set(fields):
        kinds = {key: type(value).__name__ for key, value in row.items()}
        raise ValueError(f"the template needs the fields {sorted(missing)} as strings, got {kinds}")
      for name in self._needed:
        check_text(fields[name], name)
    except ValueError as error:
      raise BadRow(self.where(number), str(error)) from error
    return fields

  def where(self, number: int) -> str:
    return self._rows.where(number)

  def digest(self) -> str:
    return self._rows.digest()


def read_task_rows(task: Task, split: str) -> TaskRows:
  """Opens a split.

  Raises:
    FileNotFoundError: the task has no such split.
    ValueError: it has no rows; a malformed row raises when it is read, see `check_task`.
  """
  if split not in task.files:
    raise FileNotFoundError(f"task {task.name!r} has no {split} split; it has {sorted(task.files)}")
  source = task.files[split]
  rows = TaskRows(task, open_rows(source, cache_folder(task.cache)))
  if not len(rows):
    skipped = f" ({sum(rows.skipped.values())} were skipped: {dict(rows.skipped)})" if rows.skipped else ""
    raise ValueError(f'{source} holds no rows{skipped}; expected lines such as {{"input": "…", "target": "…"}}')
  return rows
