"""Tasks and the domain folder.

corpus.jsonl               {"text": …} a line: unlabelled documents of the domain
corpus_validation.jsonl    optional; else every 20th document of the corpus is held out
tasks.json                 {"NAME": {"kind": "classification" or "generation", "instruction": …,
                            "labels": […] (classification), "templates": [{"input": …, "target": …}] (optional)}}
NAME/{train,validation,test}.jsonl    {"input": …, "target": …} a line, and any further string fields
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.sources import read_rows, read_texts, string_field
from data.tokenizer import Tokenizer

KINDS = ("classification", "generation")
SPLITS = ("train", "validation", "test")
DEFAULT_TEMPLATE = {"input": "{task}: {instruction}\n{input}", "target": "{target}"}
HOLD_OUT = 20  # every 20th document, where a domain has no corpus_validation.jsonl
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = ("general", "domain", "tasks")  # other names in a mixture


@dataclasses.dataclass(frozen=True)
class Task:
  """A job the model learns, told from the others by its prompt.

  Attributes:
    name: also the prompt's prefix.
    kind: "classification" or "generation".
    instruction: what to do, in words.
    labels: classification: every label, as text.
    templates: how a row becomes (input, target); `{field}` names a field of the row, `{task}` or `{instruction}`.
    files: split -> path of a `.jsonl` file.
  """

  name: str
  kind: str
  instruction: str
  labels: tuple[str, ...] = ()
  templates: tuple[Mapping[str, str], ...] = (DEFAULT_TEMPLATE,)
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def as_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON-able values; `from_dict` reads them."""
    fields = dataclasses.asdict(self)
    return {**fields, "labels": list(self.labels), "templates": [dict(template) for template in self.templates]}

  @staticmethod
  def from_dict(name: str, fields: Mapping[str, Any], where: str = "task") -> "Task":
    """Makes a task from the fields of `tasks.json` or of a config.

    Raises:
      ValueError: a field is missing or malformed; `where` says which file.
    """
    where = f"{where}: task {name!r}"
    if not NAME.fullmatch(name) or name in RESERVED:
      raise ValueError(f"{where}: a name is letters, digits, '_' and '-', and not one of {RESERVED}")
    kind, labels = fields.get("kind"), fields.get("labels") or ()
    if kind not in KINDS:
      raise ValueError(f"{where}: `kind` must be one of {KINDS}, got {kind!r}")
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not all(isinstance(x, str) and x for x in labels):
      raise ValueError(f"{where}: `labels` must be a list of non-empty strings, got {labels!r}")
    if kind == "classification" and (len(labels) < 2 or len(set(labels)) < len(labels)):
      raise ValueError(f"{where}: classification needs at least two different `labels`, got {list(labels)}")
    templates = tuple(dict(template) for template in fields.get("templates") or (DEFAULT_TEMPLATE,))
    for template in templates:
      if set(template) != {"input", "target"}:
        raise ValueError(f"{where}: a template has exactly `input` and `target`, got {sorted(template)}")
      for text in template.values():
        template_fields(text, where)
    instruction = fields.get("instruction", "")
    if not isinstance(instruction, str):
      raise ValueError(f"{where}: `instruction` must be a string, got {instruction!r}")
    files = {split: fields[split] for split in SPLITS if fields.get(split)} or dict(fields.get("files") or {})
    return Task(name, kind, instruction, tuple(labels), templates, files)


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
  corpus: list[str]
  corpus_test: list[str]
  tasks: Mapping[str, Task]


def load_domain(folder: str | Path, more_tasks: Mapping[str, Any] | None = None) -> Domain:
  """Reads a domain folder; see the top of this file.

  Args:
    folder: the folder.
    more_tasks: `config.tasks`: further tasks, with paths.

  Raises:
    FileNotFoundError: a part is missing.
    ValueError: a part is malformed; names file, line and what to do.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"domain folder {folder} is missing; its form is described in README, 'Your own domain'")
  corpus = read_texts(folder / "corpus.jsonl")
  if (folder / "corpus_validation.jsonl").exists():
    held_out = read_texts(folder / "corpus_validation.jsonl")
  else:
    corpus, held_out = hold_out(corpus)
  tasks = {name: check_task(task) for name, task in _read_tasks(folder).items()}
  more = {name: Task.from_dict(name, fields, "config.tasks") for name, fields in (more_tasks or {}).items()}
  tasks |= {name: check_task(task) for name, task in more.items()}
  return Domain(folder.resolve().name, corpus, held_out, tasks)


def hold_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits documents: every `HOLD_OUT`-th is held out.

  Example:
    >>> [len(part) for part in hold_out(["text"] * 40)]
    [38, 2]
  """
  held = [text for i, text in enumerate(texts) if i % HOLD_OUT == HOLD_OUT - 1]
  return [text for i, text in enumerate(texts) if i % HOLD_OUT != HOLD_OUT - 1], held


def _read_tasks(folder: Path) -> dict[str, Task]:
  file = folder / "tasks.json"
  if not file.exists():
    raise FileNotFoundError(
      f"{file} is missing: it names the domain's tasks, such as "
      '{"urgency": {"kind": "classification", "instruction": "…", "labels": ["a", "b"]}}'
    )
  try:
    parsed = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{file}: not JSON in UTF-8 ({error})") from error
  if not isinstance(parsed, dict) or not all(isinstance(fields, dict) for fields in parsed.values()):
    raise ValueError(f'{file}: expected an object of objects, {{"NAME": {{"kind": …}}}}')
  tasks = {}
  for name, fields in parsed.items():
    task = Task.from_dict(name, fields, str(file))  # checks the name before it becomes a path
    files = {split: str(folder / name / f"{split}.jsonl") for split in SPLITS}
    tasks[name] = dataclasses.replace(task, files={split: path for split, path in files.items() if Path(path).exists()})
  return tasks


def check_task(task: Task) -> Task:
  """Reads every row of a task once.

  Raises:
    FileNotFoundError: no train or no test file.
    ValueError: a malformed row, or a label that `labels` lacks; with file and line.
  """
  for split in ("train", "test"):
    if split not in task.files:
      raise FileNotFoundError(f"task {task.name!r} has no {split} split: expected {task.name}/{split}.jsonl")
  for split in task.files:
    read_task_rows(task, split)
  return task


def read_task_rows(task: Task, split: str) -> list[dict[str, str]]:
  """Reads a split's rows: `input`, `target` and any further string fields.

  Raises:
    FileNotFoundError: the task has no such split.
    ValueError: see `check_task`.
  """
  if split not in task.files:
    raise FileNotFoundError(f"task {task.name!r} has no {split} split; it has {sorted(task.files)}")
  file, rows = task.files[split], []
  needed = {name for template in task.templates for text in template.values() for name in template_fields(text, file)}
  for line, row in read_rows(file):
    where = f"{file}:{line}"
    string_field(row, "input", where)
    string_field(row, "target", where)
    if task.labels and row["target"] not in task.labels:
      raise ValueError(
        f"{where}: label {row['target']!r} is not one of the task's labels {list(task.labels)}; "
        "add it to tasks.json or mend the row"
      )
    fields = {key: value for key, value in row.items() if isinstance(value, str)}
    if missing := needed - {*fields, "task", "instruction"}:
      raise ValueError(f"{where}: the template needs {sorted(missing)}, the row has {sorted(fields)}")
    rows.append(fields)
  if not rows:
    raise ValueError(f'{file} holds no rows; expected lines such as {{"input": "…", "target": "…"}}')
  return rows


_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


def template_fields(template: str, where: str) -> list[str]:
  """Returns the fields a template names.

  Raises:
    ValueError: anything in braces but a plain field name (`str.format` would reach attributes through it).

  Example:
    >>> template_fields("{task}: {input} {{x}}", "here")
    ['task', 'input']
  """
  if not isinstance(template, str):
    raise ValueError(f"{where}: a template must be a string, got {template!r}")
  for match in _PIECE.finditer(template):
    if match[0] in "{}":
      allowed = "only plain {field} names are allowed; write {{ for a brace"
      raise ValueError(f"{where}: template {template!r}: {allowed}")
  return [match[1] for match in _PIECE.finditer(template) if match[1]]


def fill(template: str, fields: Mapping[str, str]) -> str:
  """Puts fields into a template; braces in a field's value are left as they are.

  Example:
    >>> fill("{a} {{b}}", {"a": "{b}"})
    '{b} {b}'
  """
  return _PIECE.sub(lambda match: fields[match[1]] if match[1] else match[0][0], template)


def render(task: Task, row: Mapping[str, str], template: int = 0) -> tuple[str, str]:
  """Returns the prompt and the answer of a row.

  Args:
    task: the task.
    row: needs the fields of the template; for a prompt alone `target` may be missing.
    template: which of the task's templates.

  Example:
    >>> render(Task("urgency", "generation", "How urgent?"), {"input": "SOB", "target": "high"})
    ('urgency: How urgent?\\nSOB', 'high')
  """
  fields = {"target": "", **row, "task": task.name, "instruction": task.instruction}
  chosen = task.templates[template % len(task.templates)]
  return fill(chosen["input"], fields), fill(chosen["target"], fields)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """Encodes a prompt, with the EOS that separates it from the answer in both architectures."""
  return [*tokenizer.encode(text), tokenizer.eos_id]


encode_target = encode_prompt  # an answer ends in EOS, too: a label that begins another label stays distinct


def nested_labels(task: Task, tokenizer: Tokenizer) -> list[tuple[str, str]]:
  """Returns the pairs of labels of which the first one's tokens begin the second one's; only EOS tells them apart."""
  ids = dict(zip(task.labels, tokenizer.encode_batch(task.labels), strict=True))
  return [(a, b) for a in ids for b in ids if a != b and ids[b][: len(ids[a])] == ids[a]]
