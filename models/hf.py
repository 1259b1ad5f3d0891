"""Weights of Hugging Face folders, read into our parameters tensor by tensor; `models/hf_export.py` writes them.

A tensor goes from its file straight to the devices that hold it: the host has no more of it at a time than what its own
devices take of one layer. `models/families.py` says what is what.
"""

import functools
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.families import COPIES, FAMILIES, HEAD, NOTHING, Config, Family
from models.gpt import GPTConfig
from models.model import Model, make_config
from models.module import Params
from models.rows import Dims, Row
from models.sharding import by_path, param_shardings
from models.weights import BLOCK_BYTES, DTYPES, Tensor, not_read, open_tensors, same

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles
HUB_COPIES = ["consolidated*"]  # the same weights again, in the form of whoever trained them


def is_model(folder: str | Path) -> bool:
  """Says whether a folder holds a model in Hugging Face's form."""
  try:
    value = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(value, dict) and "model_type" in value


def download(name: str) -> Path:
  """Returns a local folder with a model of the hub: its safetensors, config and tokenizer files.

  Raises:
    FileNotFoundError: it cannot be had, or its weights are pickles.
  """
  import huggingface_hub  # only this needs it
  from huggingface_hub import errors

  try:
    folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    others = [] if any(folder.glob("*.safetensors")) else huggingface_hub.HfApi().list_repo_files(name)
  except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
    raise FileNotFoundError(
      f"hf:{name} cannot be had from the hub ({error}); check its name and the network, or give a folder"
    ) from error
  if advice := not_read(others):
    raise FileNotFoundError(f"hf:{name} has no safetensors{advice}")
  return folder


class Published(NamedTuple):
  """What a folder says of its model, weights apart.

  Attributes:
    model_type: a key of `FAMILIES`.
    architecture: "gpt" or "t5".
    fields: of `GPTConfig` or `T5Config`, without `vocab_size`.
    vocab_size: rows of the embedding.
    dtype: of the embedding in the files.
  """

  model_type: str
  architecture: str
  fields: dict[str, Any]
  vocab_size: int
  dtype: str


def describe(folder: Path) -> Published:
  """Reads a folder's config.json and the headers of its weights.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a family or a setting that is not supported, or damaged files.
  """
  theirs = _their_config(folder)
  family, tensors = FAMILIES[theirs.model_type], _tensors(folder, FAMILIES[theirs.model_type])
  try:
    fields = family.fields(theirs)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{folder}/config.json lacks a setting of {theirs.model_type} ({error!r}); fetch it again"
    ) from error
  table = make_config(family.form, {**fields, "tied": True, "vocab_size": 1})
  embedding = tensors.get(family.rows(table)[0].theirs)
  if embedding is None:
    raise ValueError(f"{folder} has no tensor {family.rows(table)[0].theirs!r}; it has {sorted(tensors)[:5]} …")
  head = tensors.get(HEAD)
  # A head is written though it is the embedding; whether it is one of its own, its bytes say.
  tied = head is None or (bool(theirs.tie_word_embeddings) and same(head, embedding))
  architecture = "gpt" if family.form is GPTConfig else "t5"
  if head is None and architecture == "gpt" and not theirs.tie_word_embeddings:  # T5's flag says something else
    raise ValueError(
      f'{folder} has no tensor {HEAD!r}, and config.json says "tie_word_embeddings": false: these are the weights of a '
      "model without its head, such as one of embeddings; take those of the language model (…ForCausalLM)"
    )
  return Published(theirs.model_type, architecture, {**fields, "tied": tied}, embedding.shape[0], embedding.dtype)


def _their_config(folder: Path) -> Any:
  import transformers  # slow to import; its config classes know the defaults and older forms of every key
  from huggingface_hub.errors import StrictDataclassError

  file = folder / "config.json"
  kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ValueError(f"{file}: model_type {kind!r} is not supported; known: {sorted(FAMILIES)}")
  try:
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
  except (ValueError, TypeError, LookupError, AttributeError, OSError, StrictDataclassError) as error:
    raise ValueError(f"{file} is no config of {kind} ({error}); mend it or fetch it again") from error


def _tensors(folder: Path, family: Family) -> dict[str, Tensor]:
  """Returns a folder's tensors under the names that the family's whole model gives them."""
  tensors = open_tensors(folder)
  if not any(name.startswith(family.prefix) for name in tensors):
    tensors = {name if name == HEAD else family.prefix + name: tensor for name, tensor in tensors.items()}
  return {name: tensor for name, tensor in tensors.items() if not re.search(NOTHING, name)}


def load(folder: Path, model: Model, mesh: Mesh) -> Params:
  """Reads a folder's weights onto a mesh.

  Args:
    folder: in Hugging Face's form.
    model: of the shape that `describe` tells; its vocabulary may be larger.
    mesh: the current mesh.

  Returns:
    The parameters, in the dtypes that `model.init` gives them. Rows that the vocabulary has beyond the folder's start
    as the mean of the folder's rows, and that is printed.

  Raises:
    FileNotFoundError: no safetensors.
    ValueError: a tensor that is missing, unknown or of another shape, by name.
  """
  family = FAMILIES[_their_config(folder).model_type]
  tensors, rows = _tensors(folder, family), family.rows(model.config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  leaves = by_path(shapes)
  layouts = by_path(param_shardings(shapes, mesh))
  if left := set(leaves) - {row.ours for row in rows}:
    raise ValueError(f"models/families.py has no row for the parameters {sorted(left)}; add them")
  _check_names(folder, model.config, rows, leaves, tensors)
  new = model.config.vocab_size - tensors[rows[0].theirs].shape[0]
  if new:
    print(f"{folder}: {new} new rows of vocabulary start as the mean of its {tensors[rows[0].theirs].shape[0]} rows")
  progress = _Progress(sum(row.layers(leaves[row.ours].shape) for row in rows))
  params: Params = {}
  for row in rows:
    place = params
    *folders, last = row.ours.split("/")
    for name in folders:
      place = place.setdefault(name, {})
    place[last] = _load_row(row, leaves[row.ours], layouts[row.ours], tensors, model.config.vocab_size, progress)
  return params


def _check_names(folder: Path, config: Config, rows: list[Row], leaves, tensors: Mapping[str, Tensor]) -> None:
  embedding = tensors.get(rows[0].theirs)
  expected: dict[str, tuple[int, ...]] = {}
  for row in rows:
    ours = leaves[row.ours].shape
    shape = row.dims(ours).shape(embedding.shape[0] if embedding else 0)
    expected |= {row.theirs.format(layer): shape for layer in range(row.layers(ours))}
  if missing := [name for name in expected if name not in tensors]:
    raise ValueError(f"{folder} lacks {len(missing)} tensors, such as {missing[0]!r}; fetch its files again")
  if unknown := sorted(set(tensors) - set(expected) - {*COPIES, *([HEAD] if config.tied else [])}):
    raise ValueError(f"{folder} has {len(unknown)} tensors that no part of {config} is, such as {unknown[0]!r}")
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise ValueError(f"{folder}: tensor {name!r} has shape {tensors[name].shape}, by config.json it is {shape}")
    if tensors[name].dtype not in DTYPES.values():
      raise ValueError(f"{folder}: tensor {name!r} is {tensors[name].dtype}; known: {sorted(DTYPES.values())}")
  for name in COPIES:
    if name in tensors and not same(tensors[name], embedding):
      raise ValueError(f"{folder}: {name!r} differs from {rows[0].theirs!r}; two embeddings are not supported")
  if embedding.shape[0] > config.vocab_size:
    raise ValueError(f"{folder}: {embedding.shape[0]} rows of vocabulary do not fit a model of {config.vocab_size}")


def _load_row(row: Row, leaf, layout, tensors: Mapping[str, Tensor], vocab_size: int, progress) -> jax.Array:
  """Returns one parameter, all of its layers."""
  dims = row.dims(leaf.shape)
  one = NamedSharding(layout.mesh, P(*layout.spec[1:])) if row.stacked else layout

  def read(layer: int) -> jax.Array:
    tensor = tensors[row.theirs.format(layer)]
    fill = _mean_row(tensor) if "V" in dims.sizes and tensor.shape[0] < vocab_size else None
    part = functools.partial(_read, tensor, row.part, dims, fill=fill, vocab_size=vocab_size)
    value = jax.make_array_from_callback(tuple(dims.sizes.values()), one, part)
    progress.step()
    return jax.block_until_ready(value)  # the host's copy goes before the next one is made

  if not row.stacked:
    return jax.jit(lambda x: x.astype(leaf.dtype), donate_argnums=0)(read(0))
  stack = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=layout)()
  for layer in range(leaf.shape[0]):
    stack = _put(stack, read(layer), np.int32(layer))
  return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), layer, 0)


def _read(
  tensor: Tensor, part: tuple[int, int], dims: Dims, index: tuple[slice, ...], fill: np.ndarray | None, vocab_size: int
) -> np.ndarray:
  """Reads what one device holds of a tensor, in our order of dims; the file's rows come in blocks.

  Args:
    tensor: in the file.
    part: see `Row`.
    dims: of the row.
    index: a slice of each of our dims.
    fill: what rows of the vocabulary beyond the file's are, or None.
    vocab_size: rows from here on are padding, and 0.
  """
  spans = {letter: range(size)[cut] for cut, (letter, size) in zip(index, dims.sizes.items(), strict=True)}
  dtype = ml_dtypes.bfloat16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
  out = np.zeros([len(span) for span in spans.values()], dtype)
  theirs = out.transpose(dims.order)  # a view in their order, with their groups taken apart
  first, *others = (spans[letter] for group in dims.groups for letter in group)
  inner = tuple(slice(span.start, span.stop) for span in others)
  (_, *within), *rest = dims.split(0)
  each = int(np.prod(within))  # rows of the file for one step along the first letter
  width = tensor.shape[-1] // part[1]
  ours = slice(part[0] * width, (part[0] + 1) * width)  # of their last dim
  flat = len(tensor.shape) == 1  # whose last dim is the rows
  end = min(first.stop, tensor.shape[0] // each)
  step = max(BLOCK_BYTES // (each * tensor.row_bytes), 1)
  for at in range(first.start, end, step):
    stop = min(at + step, end)
    block = tensor.rows(at * each + flat * ours.start, stop * each + flat * ours.start)
    block = block if flat else block[:, ours]
    block = block.reshape([stop - at, *within, *(size for group in rest for size in group)])
    theirs[at - first.start : stop - first.start] = block[(slice(None), *inner)]
  if fill is not None:
    theirs[max(end - first.start, 0) : max(vocab_size - first.start, 0)] = fill[inner].astype(dtype)
  return out


def _mean_row(tensor: Tensor) -> np.ndarray:
  return sum(block.astype(np.float64).sum(axis=0) for _, block in tensor.blocks()) / tensor.shape[0]


class _Progress:
  """Says how far the reading is, every few seconds."""

  def __init__(self, total: int):
    self._done, self._total, self._began, self._said = 0, total, time.monotonic(), time.monotonic()

  def step(self) -> None:
    """Counts a tensor."""
    self._done += 1
    if time.monotonic() - self._said > 5:
      self._said = time.monotonic()
      rate = self._done / (self._said - self._began)
      left = (self._total - self._done) / rate
      print(f"weights: {self._done}/{self._total} tensors, {rate:.1f} a second, {left:.0f} s left", flush=True)
