"""Weights in and out: a Hugging Face folder made a stage, a stage made a Hugging Face folder, and a look at either."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from data.tokenizer import Tokenizer
from models import Model, hf, hf_export, lora, peft
from models.families import FAMILIES
from models.sharding import AXES, BATCH, batch_parts, make_mesh, param_shardings, param_specs, path_name
from train import stage
from train.checkpoint import Checkpoints
from train.evaluator import goes_on
from train.loop import build_model, state_like
from train.plan import bytes_of
from train.tuning import build_tuning

DTYPES = ("float32", "bfloat16")


def import_model(source: str, target: Path, adapters: str = "") -> None:
  """Makes a Hugging Face folder a stage that every verb takes as `--model` or `init_from`.

  Args:
    source: the folder, or "hf:NAME".
    target: the new stage's folder.
    adapters: a PEFT folder of adapters for these weights, to be merged into them; "" = none. The stage knows the tasks
      that the adapters learned, where Argot wrote them; else those of the weights, whose calibration is of no use then.

  Raises:
    FileNotFoundError: no such folder, or no safetensors in it.
    ValueError: not Hugging Face's form, adapters that do not fit, or a folder that is in use.
  """
  folder = stage.find(source)
  if not hf.is_model(folder):
    raise ValueError(f"--from={source} is a run of Argot's already; give it as --model or config.init_from as it is")
  _must_be_new(target)
  kind, config, tokenizer = hf.describe(folder).model_type, stage.read_config(folder), stage.read_tokenizer(folder)
  asked_as = stage.read_asked_as(Path(adapters)) if adapters else {}
  with config.unlocked():
    config.update(asked_as)
  model, mesh = build_model(config, tokenizer), _all_devices()
  with jax.set_mesh(mesh):
    params = hf.load(folder, model, mesh)
    if adapters:
      found = peft.read(Path(adapters), FAMILIES[kind], model)
      placed = jax.device_put(found.params, param_shardings(found.params, mesh))
      params = jax.jit(partial(lora.merge, scale=found.scale), donate_argnums=1)(placed, params)
    stage.write_json(target / "config.json", json.loads(config.to_json()))
    _write_tasks(Path(adapters) if asked_as else folder, target, calibrated=bool(asked_as) or not adapters)
    tokenizer.save(target / "tokenizer")
    with Checkpoints(target, writes=True) as checkpoints:
      checkpoints.save(0, {"params": params}, {"steps": 0, "tokens": 0, "seconds": 0.0})
  print(f"{target}: {kind}, {_count(params):,} parameters")


def export_model(source: str, target: Path, dtype: str, file_bytes: int) -> None:
  """Writes a stage as a Hugging Face folder: config, safetensors, tokenizer, and what Argot knows of its tasks.

  Args:
    source: see `stage.find`.
    target: the new folder.
    dtype: of the weights, one of `DTYPES`.
    file_bytes: a safetensors file has at most this many, or one tensor.

  Raises:
    ValueError: a dtype that is not known, a model that no family computes, or a folder that is in use.
  """
  if dtype not in DTYPES:
    raise ValueError(f"--dtype={dtype}: known are {DTYPES}")
  folder = stage.find(source)
  config, tokenizer = stage.read_config(folder), stage.read_tokenizer(folder)
  _must_be_theirs(config, folder)
  _must_be_new(target)
  model, mesh = build_model(config, tokenizer), _all_devices()
  model_type, theirs = hf_export.their_config(model.config, dtype, config.data.decoder_length, _ids(config, tokenizer))
  part = target.with_name(target.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  with jax.set_mesh(mesh):
    size = hf_export.save(part, model_type, model.config, stage.load_params(folder, model, mesh), dtype, file_bytes)
  hf_export.save_config(part, theirs, model.config)
  _generation_config(config, tokenizer).save_pretrained(part)
  ends = not goes_on(config) or _teaches_tasks(config, stage.read_tasks(folder))
  tokenizer.export(part, begins=config.architecture == "gpt", ends=ends)
  _write_asked_as(config, folder, part)
  part.replace(target)
  print(f"{target}: {model_type}, {size / 1e9:.2f} GB of {dtype}, read back and compared")
  asked = "EOS after a prompt, as before an answer" if ends else "no EOS after a prompt, for the model goes on with it"
  print(f"{target}: the tokenizer puts {asked}")


def _teaches_tasks(config: Any, tasks: Mapping[str, Any]) -> bool:
  """Says whether a stage learned tasks, and not only text."""
  mixture = config.data.mixture.to_dict()
  return any(np.any(share) for name, share in mixture.items() if name == "tasks" or name in tasks)


def _write_asked_as(config: Any, source: Path, target: Path) -> None:
  """Writes beside weights or adapters what is needed to ask a model as its stage was asked."""
  _write_tasks(source, target)
  settings = config.to_dict()
  asked_as = {"data": {key: settings["data"][key] for key in stage.DATA_ASKED_AS}, "evaluate": settings["evaluate"]}
  stage.write_json(target / stage.ASKED_AS, asked_as)


def _write_tasks(source: Path, target: Path, calibrated: bool = True) -> None:
  """Writes the tasks that a model knows, and how its classifications are calibrated, if they are."""
  stage.write_json(target / "tasks.json", {name: task.as_dict() for name, task in stage.read_tasks(source).items()})
  if calibrated and (fitted := source / "calibration.json").exists():
    shutil.copyfile(fitted, target / fitted.name)


def export_adapters(source: str, target: Path) -> None:
  """Writes a stage's adapters alone as a PEFT folder, with their tasks, for the weights that the stage started from.

  Args:
    source: see `stage.find`; a stage with `config.lora.rank`.
    target: the new folder.

  Raises:
    ValueError: the stage was trained as a whole, no family computes its model, or the folder is in use.
  """
  folder = stage.find(source)
  config, tokenizer = stage.read_config(folder), stage.read_tokenizer(folder)
  if not config.lora.rank:
    raise ValueError(f"{folder} has no adapters: it was trained as a whole; leave out --what=adapters")
  _must_be_theirs(config, folder)
  _must_be_new(target)
  model, mesh = build_model(config, tokenizer), _all_devices()
  ids = _ids(config, tokenizer)
  model_type, _ = hf_export.their_config(model.config, "float32", config.data.decoder_length, ids)
  with jax.set_mesh(mesh):
    adapters, _ = stage.load_trained(folder, model, mesh)
  base = config.init_from.removeprefix("hf:")
  settings = {key: config.lora[key] for key in ("rank", "alpha", "rank_stabilised")}
  peft.write(target, adapters, FAMILIES[model_type], model.config, base=base, **settings)
  _write_asked_as(config, folder, target)
  print(f"{target}: {model_type}, adapters of {_count(adapters):,} parameters; weights: {base or 'from scratch'}")


def _must_be_theirs(config: Any, folder: Path) -> None:
  if config.data.bidirectional_prefix:
    raise ValueError(f"{folder} was trained with data.bidirectional_prefix, which no Hugging Face model computes")


def _must_be_new(target: Path) -> None:
  if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
    raise ValueError(f"--to={target} is in use; name a new folder")


def _all_devices() -> Mesh:
  """Splits weights over all devices, so that they fit where one device is too small."""
  return make_mesh({"fsdp": -1})


def _ids(config: Any, tokenizer: Tokenizer) -> dict[str, int]:
  ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
  start = "decoder_start_token_id" if config.architecture == "t5" else "bos_token_id"
  return {**ids, start: tokenizer.start_id}


def _generation_config(config: Any, tokenizer: Tokenizer) -> Any:
  import transformers

  asked = config.evaluate
  settings = {"max_new_tokens": asked.max_new_tokens, "do_sample": False}
  if asked.repetition_penalty != 1.0:
    settings["repetition_penalty"] = asked.repetition_penalty
  if asked.beams > 1:
    settings |= {"num_beams": asked.beams, "length_penalty": asked.length_penalty}
  return transformers.GenerationConfig(**_ids(config, tokenizer), **settings)


def _count(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def inspect_model(source: str, sizes: Mapping[str, int], rows: int, length: int) -> Iterator[str]:
  """Says what a model is and what memory it takes, without loading its weights.

  Args:
    source: see `stage.find`.
    sizes: mesh axis -> devices.
    rows: of a batch that is served.
    length: tokens of each of its rows, prompt and answer.

  Yields:
    Lines to print.
  """
  folder = stage.find(source)
  config, tokenizer = stage.read_config(folder), stage.read_tokenizer(folder)
  model = build_model(config, tokenizer)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  yield f"{folder}: {_family(folder, model, config, tokenizer)}"
  fields = dataclasses.asdict(model.config)
  yield "  " + ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", (), 0, False))
  yield f"  tokenizer: {tokenizer.vocab_size:,} tokens, {len(tokenizer.sentinel_ids)} sentinels"
  yield f"\n{'parameter':44} {'shape':28} {'values':>15}  split over"
  specs = jax.tree.leaves(param_specs(shapes), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(shapes), specs, strict=True):
    axes = ", ".join(str(axis) for axis in spec if axis) or "-"
    yield f"{path_name(path):44} {str(leaf.shape):28} {leaf.size:15,}  {axes}"
  yield f"{'in all':44} {'':28} {_count(shapes):15,}"
  yield from _memory(model, config, sizes, rows, length)


def _family(folder: Path, model: Model, config: Any, tokenizer: Tokenizer) -> str:
  if hf.is_model(folder):
    found = hf.describe(folder)
    return f"{found.model_type} ({found.architecture}), {found.dtype} in the files"
  try:
    name, _ = hf_export.their_config(model.config, "float32", config.data.decoder_length, _ids(config, tokenizer))
  except ValueError:
    return f"{config.architecture}, of no Hugging Face family"
  return f"{name} ({config.architecture}), a run of Argot's"


def _memory(model: Model, config: Any, sizes: Mapping[str, int], rows: int, length: int) -> Iterator[str]:
  """Says what each device holds, by the layouts of the real training state."""
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    weights, state = bytes_of(stage.params_like(model, mesh)), state_like(config, model, mesh)
    cache = _cache_bytes(model, mesh, rows, length)
  gradients, moments = bytes_of(state["params"]), bytes_of(state["opt"])
  adapters = gradients if build_tuning(config).partial else 0

  def mebi(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"

  over = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
  yield f"\nmemory of each device, {over}:"
  parts = f"weights {mebi(weights + adapters)}, gradients {mebi(gradients)}, {config.optimizer.name} {mebi(moments)}"
  yield f"  training  {mebi(weights + adapters + gradients + moments)}: {parts}; activations come on top"
  yield f"  serving   {mebi(weights + cache)}: weights {mebi(weights)}, cache of {rows} rows of {length} {mebi(cache)}"


def _cache_bytes(model: Model, mesh: AbstractMesh, rows: int, length: int) -> int:
  """Returns the bytes of a device's part of the decoding cache of a batch; call under the mesh."""
  parts = batch_parts(mesh)
  prompts = model.prompts([[1]] * (-(-rows // parts) * parts), length, 0)
  placed = {
    key: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
    for key, value in prompts.items()
  }
  return bytes_of(jax.eval_shape(partial(model.prefill, room=1), stage.params_like(model, mesh), placed)["layers"])
