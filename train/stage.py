"""A stage's folder on disk: what it holds, how it is found and loaded again.

config.json   the resolved config        tokenizer/    its tokenizer
tasks.json    the tasks it knows         checkpoints/  see train/checkpoint.py
metrics.jsonl, events.*                  the log
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.base import get_config
from data.sources import Texts
from data.tasks import Domain, Task
from data.tokenizer import Tokenizer, load_tokenizer
from models import Model
from models.sharding import param_shardings
from train.checkpoint import Checkpoints
from train.tuning import build_tuning

# What may change between a stop and the next start: nothing here shapes a number of the run.
FREE_KEYS = ("mesh", "cpu_devices", "evaluate", "stages", "arms", "init_from", "domain", "general", "data.cache_dir")
FREE_KEYS += tuple(
  f"train.{key}" for key in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "prefetch_batches")
)
MAIN_LINE = ("multitask", "continued", "base")  # where a workdir's model is, best first


class Materials(NamedTuple):
  """What a stage is made from, loaded once and shared by a recipe's stages.

  Attributes:
    tokenizer: the tokenizer.
    domain: corpus and tasks.
    general: training documents of the general text; None where there is none.
    general_test: held-out documents of the general text, or None.
    sources: name -> training documents of `config.sources`.
  """

  tokenizer: Tokenizer
  domain: Domain
  general: Texts | None
  general_test: Texts | None
  sources: Mapping[str, Texts]


def write_json(path: Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, never half of one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  os.replace(part, path)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested mappings as one dict with dotted keys.

  Example:
    >>> flat({"train": {"steps": 3}, "seed": 0})
    {'train.steps': 3, 'seed': 0}
  """
  items: dict[str, Any] = {}
  for key, value in tree.items():
    items |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return items


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns one line for each dotted key whose value differs."""
  then, now = flat(then), flat(now)
  return [
    f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
    for key in sorted(then.keys() | now.keys())
    if then.get(key) != now.get(key)
  ]


def write_description(workdir: Path, config: ConfigDict, materials: Materials) -> None:
  """Writes what is needed to load the stage later, or checks that the folder already holds the same.

  Raises:
    ValueError: the folder was made with another config; the message lists what differs.
  """
  resolved = json.loads(config.to_json())
  path = workdir / "config.json"
  if path.exists():
    lines = [
      line
      for line in differences(json.loads(path.read_text()), resolved)
      if not any(line.startswith((f"{key}:", f"{key}.")) for key in FREE_KEYS)
    ]
    if lines:
      raise ValueError(
        f"{workdir} holds a run with another config:\n  " + "\n  ".join(lines) + "\n"
        "Take another --workdir, or delete that folder, or go back to its config."
      )
  write_json(path, resolved)
  write_json(workdir / "tasks.json", {name: task.as_dict() for name, task in materials.domain.tasks.items()})
  materials.tokenizer.save(workdir / "tokenizer")


def check_same_input(then: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
  """Refuses to go on over another input than the checkpoint's.

  Raises:
    ValueError: with a line for each thing that differs.
  """
  lines = differences(then, now)
  if lines:
    raise ValueError(
      f"the input differs from that of the checkpoint in {where}:\n  " + "\n  ".join(lines) + "\n"
      "Put the input back as it was, or start in another --workdir (init_from takes over the parameters)."
    )


def check_same_everywhere(fingerprint: Mapping[str, Any], config: ConfigDict) -> None:
  """Refuses to start where processes would train on different batches; waits for all of them.

  Raises:
    ValueError: with what this process has, where its hash of a part is not that of process 0.
  """
  parts = {f"input {key}": value for key, value in fingerprint.items()}
  parts |= {f"config.{key}": value for key, value in flat(json.loads(config.to_json())).items()}
  hashes = np.array([zlib.crc32(f"{key}={parts[key]}".encode()) for key in sorted(parts)], np.uint32)
  # Lengths may differ, too: a fixed number of values is compared first.
  whole = np.array([len(hashes), zlib.crc32(hashes.tobytes())], np.uint32)
  if (multihost_utils.process_allgather(whole) == whole).all():
    return
  everywhere = multihost_utils.process_allgather(np.resize(hashes, 512))  # enough to name what differs
  names = [key for key, same in zip(sorted(parts), (everywhere == everywhere[0]).all(axis=0), strict=False) if not same]
  here = "\n  ".join(f"{name}: {parts[name]!r}" for name in names[:10])
  raise ValueError(
    f"the {jax.process_count()} processes do not have the same input; process {jax.process_index()} has:\n  {here}\n"
    "Give all of them the same config and files."
  )


def find(folder: str | Path) -> Path:
  """Finds the stage that `--model=DIR` or `init_from` means.

  Args:
    folder: a stage's folder, or a recipe's workdir: then its `multitask` stage, else the last main stage it has.

  Raises:
    FileNotFoundError: there is no stage with a checkpoint.
  """
  folder = Path(folder)
  candidates = [folder, *(folder / "stages" / name for name in MAIN_LINE)]
  for candidate in candidates:
    if (candidate / "config.json").exists() and (candidate / "checkpoints").is_dir():
      return candidate
  raise FileNotFoundError(
    f"no model in {folder}: expected a stage's folder (config.json and checkpoints/), or a run's workdir with "
    f"stages/{{{','.join(MAIN_LINE)}}}/"
  )


def read_config(folder: Path) -> ConfigDict:
  """Returns the config that a stage was made with, over today's defaults."""
  config = get_config()
  with config.unlocked():
    config.update(json.loads((folder / "config.json").read_text()))
  return config


def read_tasks(folder: Path) -> dict[str, Task]:
  """Returns the tasks that a stage knows."""
  return {
    name: Task.from_dict(name, fields) for name, fields in json.loads((folder / "tasks.json").read_text()).items()
  }


def read_tokenizer(folder: Path) -> Tokenizer:
  """Returns a stage's tokenizer."""
  return load_tokenizer(str(folder / "tokenizer"))


def params_like(model: Model, mesh: Mesh) -> Any:
  """Returns the parameters' shapes, types and layout; call under `jax.set_mesh(mesh)`."""
  return laid_out(jax.eval_shape(model.init, jax.random.key(0)), mesh)


def laid_out(shapes: Any, mesh: Mesh) -> Any:
  """Gives shapes of parameters (or of adapters) the layout of the sharding table."""
  return jax.tree.map(
    lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
    shapes,
    param_shardings(shapes, mesh),
  )


def scratch_params(config: ConfigDict, model: Model, mesh: Mesh) -> Any:
  """Draws new parameters by `config.seed`."""
  layout = param_shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
  return jax.jit(model.init, out_shardings=layout)(jax.random.key(config.seed))


def load_params(folder: str | Path, model: Model, mesh: Mesh) -> Any:
  """Loads the newest parameters of a stage; adapters are merged into the weights that they were trained beside.

  Args:
    folder: see `find`.
    model: the model they are for.
    mesh: where to put them; call under `jax.set_mesh(mesh)`.

  Raises:
    FileNotFoundError: no stage or no checkpoint; or the stage holds adapters, and the weights they belong to are gone.
    ValueError: the parameters are not this model's, names the first that differs; or the weights that adapters belong
      to have changed.
  """
  folder = find(folder)
  then, now = read_config(folder), model.config
  tuning = build_tuning(then)
  with Checkpoints(folder) as checkpoints:
    newest = checkpoints.latest()
    if newest is None:
      raise FileNotFoundError(f"{folder} has no checkpoint yet")
    try:
      like = params_like(model, mesh)
      trained = checkpoints.restore_params(newest, laid_out(tuning.like(like), mesh))
    except (ValueError, KeyError) as error:
      was = f"{then.architecture} {then.model.size}"
      raise ValueError(f"the parameters in {folder} ({was}) are not those of {now}: {error}") from error
    if not tuning.partial:
      return trained
    record = checkpoints.restore_run(newest)
  frozen = load_frozen(then, folder, record, model, mesh)
  return jax.jit(tuning.merge, donate_argnums=1)(trained, frozen)


def load_frozen(config: ConfigDict, folder: Path, record: Mapping[str, Any], model: Model, mesh: Mesh) -> Any:
  """Loads the weights that a stage's adapters were trained beside: where the stage started, made or read again.

  Args:
    config: of the stage.
    folder: of the stage.
    record: of its checkpoint; `base` tells which checkpoint of `config.init_from` it was.
    model: the model.
    mesh: where to put them.

  Raises:
    FileNotFoundError: they are gone.
    ValueError: others are there.
  """
  if not config.init_from:
    return scratch_params(config, model, mesh)
  try:
    source = find(config.init_from)
  except FileNotFoundError as error:
    # A recipe's folder that was moved or copied as a whole: the stage lies beside this one, and `base` proves it.
    source = folder.parent / Path(config.init_from).name
    if not (source / "checkpoints").is_dir():
      raise FileNotFoundError(
        f"{folder} holds adapters only; the weights they belong to, {config.init_from}, are gone: {error}. Put them "
        f'back, or set "init_from" in {folder / "config.json"} to where they are now'
      ) from error
  found = identity(source)
  if found != record["base"]:
    raise ValueError(
      f"{folder} holds adapters for the checkpoint {record['base']} of {config.init_from}, but the newest one in "
      f"{source} is {found}: it was trained on or made anew. Put the weights back, or train the adapters again"
    )
  return load_params(source, model, mesh)


def identity(folder: Path) -> dict[str, Any]:
  """Returns what tells a stage's newest checkpoint from another's in the same folder."""
  with Checkpoints(folder) as checkpoints:
    newest = checkpoints.latest()
    record = checkpoints.restore_run(newest) if newest is not None else {}
  return {key: record.get(key) for key in ("steps", "tokens", "seconds")}
