"""What a recipe measures at every stage: held-out texts, the domain's tasks, and old skills that are not trained.

An old skill comes from `config.retain`: `{"old": FOLDER}`, a domain folder, or an earlier run of Argot's, which stands
for its domain. Its skills are named "old/domain" (perplexity of its held-out text) and "old/TASK".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data.rows import hash_of
from data.sources import Texts
from data.tasks import NAME, Domain, Task, data_file, load_domain, read_task_rows
from train import stage
from train.metrics import headline, higher_is_better
from train.stage import Materials


class Skills(NamedTuple):
  """What is measured.

  Attributes:
    texts: skill -> held-out documents, for perplexity.
    tasks: skill -> task.
    retained: of these, the old skills.
    digests: skill -> hash of the test rows; equal hashes mean the same rows in the same order.
    asked: task -> JSON-able: what else its values depend on (prompts, what is fitted on, room for an answer).
  """

  texts: Mapping[str, Texts]
  tasks: Mapping[str, Task]
  retained: frozenset[str]
  digests: Mapping[str, str]
  asked: Mapping[str, Mapping[str, Any]]

  def fingerprint(self) -> dict[str, Any]:
    """Returns what tells these skills, and their rows, from others; flat."""
    rows = {f"measured.{name}": digest for name, digest in self.digests.items()}
    return {**rows, **{f"asked.{name}": asked for name, asked in self.asked.items()}, "measured": list(self.digests)}


def build_skills(config: ConfigDict, materials: Materials) -> Skills:
  """Lists what is measured at every stage.

  Raises:
    FileNotFoundError, ValueError: an old domain that cannot be read; names its key in `config.retain`.
  """
  texts = {"general": materials.general_test} if materials.general_test else {}
  texts |= {"domain": materials.domain.corpus_test}
  tasks = dict(materials.domain.tasks)
  own = {*texts, *tasks}
  for name, folder in config.retain.items():
    old = open_old(name, folder, config)
    texts |= {f"{name}/domain": old.corpus_test}
    tasks |= {f"{name}/{task}": found for task, found in old.tasks.items()}
  return skills_of(texts, tasks, "test", config.evaluate)._replace(retained=frozenset({*texts, *tasks} - own))


def skills_of(texts: Mapping[str, Texts], tasks: Mapping[str, Task], split: str, settings: ConfigDict) -> Skills:
  """Makes skills of texts, and of tasks that are measured on a split, with `config.evaluate` as `settings`."""
  digests = {name: hash_of(found.digest(), f"{settings.corpus_tokens}") for name, found in texts.items()}
  for name, task in tasks.items():
    rows = read_task_rows(task, split).spread(settings.max_examples)
    digests[name] = hash_of(*(json.dumps(row, sort_keys=True) for row in rows))
  asked = {name: asked_as(task, settings) for name, task in tasks.items()}
  return Skills(texts, tasks, frozenset(), digests, asked)


def asked_as(task: Task, settings: ConfigDict) -> dict[str, Any]:
  """Returns what a task's values depend on beside the model, the rows and what is stored with them; JSON-able."""
  if task.kind == "generation":
    return {**task.asked(), "max_new_tokens": settings.max_new_tokens}
  fitted = read_task_rows(task, "validation").digest() if "validation" in task.files else ""
  return {**task.asked(), "validation rows": fitted}


def open_old(name: str, folder: Any, config: ConfigDict) -> Domain:
  """Opens one entry of `config.retain`.

  Args:
    name: its key.
    folder: a domain folder, a run's workdir or a stage in it.
    config: for reading rows.

  Raises:
    FileNotFoundError, ValueError: it is neither, or its domain cannot be read.
  """
  where = f"config.retain.{name}"
  if not NAME.fullmatch(name) or not isinstance(folder, str) or not folder:
    raise ValueError(f"{where}: expected a name of letters and digits, and a folder; got {folder!r}")
  path = Path(folder)
  try:
    more, there = {}, (path / "tasks.json").is_file() and data_file(path, "corpus")
    if not there:
      path, more = _domain_of(stage.find(folder))
    return load_domain(path, more, config.data.cache_dir, config.data.bad_rows)
  except (FileNotFoundError, ValueError) as error:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    expected = "expected a domain folder, or a run of Argot's whose domain is still there"
    raise kind(f"{where}={folder}: {expected}: {error}") from error


def _domain_of(found: Path) -> tuple[Path, Mapping[str, Any]]:
  """Returns the domain folder and `config.tasks` of a stage; the embedded domain lies in the run's workdir."""
  then = stage.read_config(found)
  if then.domain != "sample":
    return Path(then.domain), then.tasks.to_dict()
  kept = [parent / "domain" / "sample" for parent in (found, *found.parents[:2])]
  return next((place for place in kept if place.is_dir()), kept[-1]), then.tasks.to_dict()


def describe_skills(skills: Skills) -> list[dict[str, Any]]:
  """Returns the skills as the report lists them, see `train/report.py`."""
  listed = [{"name": name, "kind": "perplexity", "metric": "perplexity"} for name in skills.texts]
  listed += [
    {"name": name, "kind": task.kind, "metric": headline(task.kind, task.metrics), "labels": list(task.labels)}
    for name, task in skills.tasks.items()
  ]
  for skill in listed:
    skill["higher_is_better"] = higher_is_better(skill["metric"])
    if skill["name"] in skills.retained:
      skill["retained"] = True
  return listed
