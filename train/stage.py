"""A stage's folder on disk: what it holds, how it is found and loaded again.

config.json   the resolved config        tokenizer/    its tokenizer
tasks.json    the tasks it knows         checkpoints/  see train/checkpoint.py
metrics.jsonl, events.*                  the log; validation.jsonl, see train/validation.py
"""

import json
import sys
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
from data.files import put, read_json
from data.sources import Texts
from data.tasks import Domain, Task
from data.tokenizer import Tokenizer, load_tokenizer
from models import Model, hf
from models.sharding import param_shardings
from train import processes, upkeep
from train.checkpoint import Checkpoints
from train.tuning import build_tuning

# What may change between a stop and the next start: nothing here shapes a number of the run.
FREE_KEYS = ("mesh", "cpu_devices", "evaluate", "stages", "arms", "init_from", "domain", "general", "data.cache_dir")
FREE_KEYS += ("processes", "gate", "retain")
FREE_KEYS += ("tokenizer.path",)  # the tokenizer itself is in the input's fingerprint
FREE_KEYS += tuple(
  f"train.{key}" for key in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "prefetch_batches")
)
# When and on what a run is measured; `best_metric` is not free, for it says which parameters are the stage's.
FREE_KEYS += ("train.evaluate_every_steps", "train.evaluate_max_examples", "train.task_gradients_every_steps")
FREE_KEYS += ("train.profile_steps", "train.profile_first_step", "train.watchdog_seconds", "train.max_skipped_steps")
ASKED_AS = "argot.json"  # beside published weights or adapters that Argot wrote: what of the config asking them needs
DATA_ASKED_AS = ("objective", "mixture", "encoder_length", "decoder_length", "loss_normalisation")
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
  """Writes JSON; see `put`."""
  put(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


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


def settings_of(config: ConfigDict) -> dict[str, Any]:
  """Returns a config as plain values, dotted key -> value."""
  return flat(json.loads(config.to_json()))


def stored_settings(folder: Path) -> dict[str, Any]:
  """Returns the settings of a stage's folder; a key that came after it was made counts as its default."""
  return settings_of(get_config()) | flat(read_json(folder / "config.json"))


def check_description(workdir: Path, config: ConfigDict, materials: Materials) -> None:
  """Checks that a stage's folder, if there is one, was made with what it is to go on with; writes nothing.

  Raises:
    ValueError: it was made with another config, tokenizer or tasks; the message lists what differs.
  """
  if not (workdir / "config.json").exists():
    return
  lines = [
    line
    for line in differences(stored_settings(workdir), settings_of(config))
    if not any(line.startswith((f"{key}:", f"{key}.")) for key in FREE_KEYS)
  ]
  if lines:
    raise ValueError(
      f"{workdir} holds a run with another config:\n  " + "\n  ".join(lines) + "\n"
      "Take another --workdir, or delete that folder, or go back to its config."
    )
  tokenizers = ({"tokenizer": found.fingerprint()} for found in (read_tokenizer(workdir), materials.tokenizer))
  if lines := differences(*tokenizers):
    raise ValueError(
      f"{workdir} was made with the tokenizer in {workdir / 'tokenizer'}, and config.tokenizer.path, "
      f"{config.tokenizer.path!r}, is another now:\n  {lines[0]}\nGo back to it, or take another --workdir."
    )
  check_same_tasks(read_tasks(workdir), materials.domain.tasks, workdir)


def write_description(workdir: Path, config: ConfigDict, materials: Materials) -> None:
  """Writes what is needed to load the stage later, once `check_description` and the checkpoint there agree to it."""

  def write() -> None:
    materials.tokenizer.save(workdir / "tokenizer")
    write_json(workdir / "tasks.json", {name: task.as_dict() for name, task in materials.domain.tasks.items()})
    write_json(workdir / "config.json", json.loads(config.to_json()))  # last: with it the folder is a stage's

  processes.first(write)


def check_same_tasks(then: Mapping[str, Task], now: Mapping[str, Task], where: Path) -> None:
  """Refuses to ask a model otherwise than it was taught and measured; a task that came or went is not its matter.

  Raises:
    ValueError: with a line for each field that differs.
  """
  both = [name for name in then if name in now]
  if lines := differences(*({name: tasks[name].asked() for name in both} for tasks in (then, now))):
    raise ValueError(
      f"{where} was made with tasks that read otherwise:\n  " + "\n  ".join(lines) + "\n"
      "Take another --workdir, or put them back in tasks.json (config.tasks); `argot evaluate --domain=FOLDER` "
      "measures a model on tasks as they are now."
    )


def check_same_input(then: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
  """Refuses to go on over another input than the checkpoint's.

  Raises:
    ValueError: with a line for each thing that differs.
  """
  lines = differences({"order": now.get("order"), **then}, now)  # an older version did not store it
  if lines:
    raise ValueError(
      f"the input differs from that of the checkpoint in {where}:\n  " + "\n  ".join(lines) + "\n"
      "Put the input back as it was, or start in another --workdir (init_from takes over the parameters)."
    )


def check_same_everywhere(fingerprint: Mapping[str, Any], config: ConfigDict) -> None:
  """Refuses to start where processes would train, or be measured, on different batches; waits for all of them.

  Args:
    fingerprint: of what is read: name -> value, which its text identifies.
    config: what it is read with.

  Raises:
    ValueError: with what this process has, where its hash of a part is not that of process 0.
  """
  if jax.process_count() == 1:
    return
  parts = {f"input {key}": value for key, value in fingerprint.items()}
  own = ("processes.", "data.cache_dir")  # which process this is, and a folder that may be each host's own
  parts |= {f"config.{key}": value for key, value in settings_of(config).items() if not key.startswith(own)}
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
    folder: a stage's folder; a recipe's workdir: then its `multitask` stage, else the last main stage that has saved
      a step; a folder in Hugging Face's form; or "hf:NAME" of the hub.

  Raises:
    FileNotFoundError: there is no stage with a checkpoint.
  """
  if str(folder).startswith("hf:"):
    return hf.download(str(folder)[3:])
  folder = Path(folder)
  if hf.is_model(folder):
    return folder
  candidates = [folder, *(folder / "stages" / name for name in MAIN_LINE)]
  begun = [found for found in candidates if (found / "config.json").exists() and (found / "checkpoints").is_dir()]
  for candidate in begun:
    if upkeep.steps(candidate / "checkpoints"):
      return candidate
  if begun:
    raise FileNotFoundError(f"no model in {folder} yet: {begun[0]} has saved no step; run what trains it again")
  raise FileNotFoundError(
    f"no model in {folder}: expected a stage's folder (config.json and checkpoints/), a run's workdir with "
    f"stages/{{{','.join(MAIN_LINE)}}}/, a folder in Hugging Face's form (config.json and safetensors), or hf:NAME"
  )


def inherit(config: ConfigDict) -> ConfigDict:
  """Takes over what the weights in `config.init_from` bring: the model's shape and the tokenizer.

  Weights bring their tokenizer instead of one to be trained. Those in Hugging Face's form always bring their shape,
  too; those of a run do where the config says "init_from".

  Returns:
    The config, or a changed copy; what changed is printed.

  Raises:
    FileNotFoundError: no weights there.
    ValueError: another architecture, or "init_from" without weights.
  """
  model, tokenizer = config.model, config.tokenizer
  asks = "init_from" in (model.size, tokenizer.path)
  if not config.init_from:
    if asks:
      raise ValueError('config.model.size or .tokenizer.path is "init_from": set config.init_from to the weights')
    return config
  folder = find(config.init_from)
  published, new = hf.is_model(folder), tokenizer.path == "train"
  if not (asks or published or new):
    return config
  theirs = read_config(folder)
  if theirs.architecture != config.architecture:
    raise ValueError(f"{folder} holds a {theirs.architecture}, config.architecture is {config.architecture!r}")
  config = config.copy_and_resolve_references()
  with config.unlocked():
    if published or model.size == "init_from":
      print(f"model: of the shape of {folder} (config.model.size was {model.size!r})", flush=True)
      overrides = theirs.model.overrides.to_dict() | model.overrides.to_dict()
      config.model.update({"size": theirs.model.size, "vocab_size": theirs.model.vocab_size})
      config.model.overrides = ConfigDict(overrides)
    if tokenizer.path == "init_from" or new:  # a new one would give the weights' embeddings to other tokens
      print(f"tokenizer: that of {folder} (config.tokenizer.path was {tokenizer.path!r})", flush=True)
      config.tokenizer.path = str(folder if published else folder / "tokenizer")
  return config.lock()


def read_config(folder: Path) -> ConfigDict:
  """Returns the config that a stage was made with, over today's defaults; of published weights, their shape."""
  config = get_config()
  if hf.is_model(folder):
    found = hf.describe(folder)
    with config.unlocked():
      config.architecture, config.tokenizer.path = found.architecture, str(folder)
      config.data.objective = "next_token" if found.architecture == "gpt" else "span_corruption"
      config.model.update({"size": "custom", "vocab_size": found.vocab_size})
      config.model.overrides = ConfigDict(found.fields)
      config.update(read_asked_as(folder))
    return config.lock()
  with config.unlocked():
    config.update(read_json(folder / "config.json"))
  return config


def read_asked_as(folder: Path) -> dict[str, Any]:
  """Returns what of a config Argot wrote beside published weights or adapters; {} where others wrote them."""
  return read_json(folder / ASKED_AS) if (folder / ASKED_AS).exists() else {}


def read_tasks(folder: Path) -> dict[str, Task]:
  """Returns the tasks that a stage knows; published weights know none, unless Argot wrote them."""
  file = folder / "tasks.json"
  known = read_json(file) if file.exists() else {}
  return {name: Task.from_dict(name, fields) for name, fields in known.items()}


def read_tokenizer(folder: Path) -> Tokenizer:
  """Returns a stage's tokenizer."""
  return load_tokenizer(str(folder if hf.is_model(folder) else folder / "tokenizer"))


def params_like(model: Model, mesh: Mesh) -> Any:
  """Returns the parameters' shapes, types and layout; call under `jax.set_mesh(mesh)`."""
  return laid_out(jax.eval_shape(lambda: model.init(jax.random.key(0))), mesh)


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
  """Loads a stage's parameters, of its best or newest step (`Checkpoints.chosen`); adapters are merged into weights.

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
  if hf.is_model(folder):
    return hf.load(folder, model, mesh)
  config = read_config(folder)
  tuning = build_tuning(config)
  trained, record = load_trained(folder, model, mesh)
  if not tuning.partial:
    return trained
  frozen = load_frozen(config, folder, record, model, mesh)
  return jax.jit(tuning.merge, donate_argnums=1)(trained, frozen)


def load_trained(folder: Path, model: Model, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
  """Loads what a stage's chosen checkpoint holds, parameters or adapters, and its record; raises as `load_params`.

  Says on stderr where the stage has not come to its last step.
  """
  then, now = read_config(folder), model.config
  with Checkpoints(folder) as checkpoints:
    chosen, newest = checkpoints.chosen(), checkpoints.latest()
    # What was imported or averaged was not trained there, and its config's steps say nothing.
    if newest < then.train.steps and "stream" in checkpoints.restore_run(newest) and processes.is_first():
      left = f"step {newest} of {then.train.steps}: not finished; the command that trains it goes on"
      print(f"{folder}: {left}", file=sys.stderr, flush=True)
    try:
      tuning = build_tuning(then)
      like = laid_out(tuning.store(*tuning.like(params_like(model, mesh))), mesh)
      return checkpoints.restore_params(chosen, like), checkpoints.restore_run(chosen)
    except (ValueError, KeyError) as error:
      was = f"{then.architecture} {then.model.size}"
      raise ValueError(f"the parameters in {folder} ({was}) are not those of {now}: {error}") from error


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
  # A recipe's folder that was moved or copied as a whole: the stage lies beside this one, and `base` proves it. Where
  # it was, another run may lie by now.
  beside = folder.parent / Path(config.init_from).name
  places = [beside] if (beside / "checkpoints").is_dir() else []
  try:
    places.insert(0, find(config.init_from))
  except FileNotFoundError as error:
    if not places:
      raise FileNotFoundError(
        f"{folder} holds adapters only; the weights they belong to, {config.init_from}, are gone: {error}. Put them "
        f'back, or set "init_from" in {folder / "config.json"} to where they are now'
      ) from error
  found = {}
  for place in places:
    found[place] = identity(place)
    if found[place] == record["base"]:
      return load_params(place, model, mesh)
  there = " and ".join(f"that in {place} is {now}" for place, now in found.items())
  raise ValueError(
    f"{folder} holds adapters for the checkpoint {record['base']} of {config.init_from}, but {there} now: it was "
    "trained on or made anew. Put the weights back, or train the adapters again"
  )


def identity(folder: Path) -> dict[str, Any]:
  """Returns what tells a stage's chosen checkpoint, or published weights, from others in the same folder."""
  if hf.is_model(folder):
    return {file.name: _sampled(file) for file in sorted(folder.glob("*.safetensors"))}
  with Checkpoints(folder) as checkpoints:
    return checkpoints.identity()


def _sampled(file: Path) -> str:
  """Returns the size and a checksum of blocks from all over a file; other weights of the same shape differ there."""
  blocks, block_bytes = 64, 1 << 16
  size, crc = file.stat().st_size, 0
  with file.open("rb") as opened:
    for number in range(blocks):
      opened.seek(number * max(size - block_bytes, 0) // (blocks - 1))
      crc = zlib.crc32(opened.read(block_bytes), crc)
  return f"{size}-{crc:08x}"
