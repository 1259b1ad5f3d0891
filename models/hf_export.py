"""Our parameters written as a Hugging Face folder: which family says what a config says, and its tensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from models.families import FAMILIES, Config, meaning
from models.gpt import GPTConfig
from models.model import make_config
from models.module import Params
from models.rows import Row
from models.sharding import by_path
from models.weights import Writer

FILE_BYTES = 5 * 10**9  # a safetensors file of an export has at most this many, or one tensor


def their_config(config: Config, dtype: str, max_length: int, ids: Mapping[str, int | None]) -> tuple[str, Any]:
  """Returns the family that can say what a config says, and its config.

  Args:
    config: ours.
    dtype: of the files.
    max_length: longest sequence, where the config does not say.
    ids: `pad_token_id`, `eos_token_id`, `bos_token_id`, `decoder_start_token_id`.

  Raises:
    ValueError: no family computes this.
  """
  import transformers

  for name, family in FAMILIES.items():
    if family.form is not type(config):
      continue
    values = {**family.values(config), "vocab_size": config.vocab_size, **ids}
    if family.form is GPTConfig and not config.max_length:
      values["max_position_embeddings"] = max_length
    try:
      theirs = transformers.AutoConfig.for_model(name, **values)
      back = make_config(family.form, {**family.fields(theirs), "tied": config.tied, "vocab_size": config.vocab_size})
    except (ValueError, TypeError, KeyError):
      continue  # this family has no word for something of it
    if meaning(back) == meaning(config):
      theirs.architectures, theirs.dtype = [family.model_class], dtype
      return name, theirs
  raise ValueError(f"no Hugging Face family computes what {config} does; known: {sorted(FAMILIES)}")


def save_config(folder: Path, theirs: Any, config: Config) -> None:
  """Writes config.json.

  For a T5 its flag of tied embeddings says whether logits are scaled, as every reader but the newest understands it.
  """
  theirs.save_pretrained(folder)
  if not isinstance(config, GPTConfig):
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"tie_word_embeddings": config.scale_logits}
    values.pop("scale_decoder_outputs", None)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save(folder: Path, model_type: str, config: Config, params: Params, dtype: str, file_bytes: int) -> int:
  """Writes parameters as a family's safetensors; each file is read back and compared.

  Args:
    folder: exists.
    model_type: from `their_config`.
    config: ours.
    params: on the mesh.
    dtype: "float32" or "bfloat16".
    file_bytes: see `FILE_BYTES`.

  Returns:
    Bytes of all tensors.
  """
  rows, leaves = FAMILIES[model_type].rows(config), by_path(params)
  kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  shapes = their_shapes(rows, params, config.vocab_size)
  sizes = {name: int(np.prod(shape)) * kind.itemsize for name, shape in shapes.items()}
  writer = Writer(folder, sizes, file_bytes) if jax.process_index() == 0 else None
  for name, layer, parts in _their_tensors(rows, leaves):
    values = [_theirs(leaves[row.ours], row, layer, config.vocab_size) for row in parts]  # by every process
    if writer is not None:
      writer.add(name, np.concatenate(values, axis=-1).astype(kind))
  if writer is not None:
    writer.close()
  return sum(sizes.values())


def their_shapes(rows: list[Row], params: Params, vocab_size: int) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each of their tensors, in the order of writing; `params` may be shapes only."""
  leaves = by_path(params)
  return {
    name: parts[0].dims(leaves[parts[0].ours].shape).shape(vocab_size)
    for name, _, parts in _their_tensors(rows, leaves)
  }


def _their_tensors(rows: list[Row], leaves: Mapping[str, Any]) -> Iterator[tuple[str, int, list[Row]]]:
  """Yields each of their tensors with its layer and the rows that it is made of."""
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(row.theirs, []).append(row)
  for theirs, parts in groups.items():
    for layer in range(parts[0].layers(leaves[parts[0].ours].shape)):
      yield theirs.format(layer), layer, parts


def _theirs(leaf: jax.Array, row: Row, layer: int, vocab_size: int) -> np.ndarray:
  dims = row.dims(leaf.shape)
  value = _fetch(leaf[layer] if row.stacked else leaf).transpose(dims.order)
  value = value[:vocab_size] if "V" in dims.sizes else value
  return value.reshape([int(np.prod(group)) for group in dims.split(vocab_size)])


def _fetch(x: jax.Array) -> np.ndarray:
  """Returns an array whole, on every process's host."""
  return np.asarray(jax.device_get(x)) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
