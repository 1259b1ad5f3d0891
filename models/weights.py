"""Tensors in safetensors files: a folder's tensors by name, read in pieces; written, and read back to compare.

Nothing is unpickled: `.bin`, `.pt` and `.ckpt` files are refused, and so is an index that points out of its folder.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
BLOCK_BYTES = 1 << 25  # read at a time
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}  # safetensors' names for ours


class Tensor(NamedTuple):
  """A tensor in a file.

  Attributes:
    file: the safetensors file.
    name: in it.
    shape: its shape.
    dtype: a value of `DTYPES`.
  """

  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: str

  def rows(self, begin: int, end: int) -> np.ndarray:
    """Reads some rows (dim 0); the file is mapped only meanwhile, so that pages do not pile up."""
    with safetensors.safe_open(self.file, "np") as opened:
      return opened.get_slice(self.name)[begin:end]

  @property
  def row_bytes(self) -> int:
    """Bytes of a row."""
    return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype).itemsize * max(math.prod(self.shape[1:]), 1)

  def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) in pieces of about `BLOCK_BYTES`."""
    step = max(BLOCK_BYTES // self.row_bytes, 1)
    for begin in range(0, self.shape[0], step):
      yield begin, self.rows(begin, min(begin + step, self.shape[0]))


def open_tensors(folder: Path) -> dict[str, Tensor]:
  """Finds the tensors of a folder in Hugging Face's form, one file or several with an index.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.

  Returns:
    Tensor name -> where it is; only headers are read.

  Raises:
    FileNotFoundError: no safetensors there; with advice where there are pickles.
    ValueError: a damaged file, an index that names other files or tensors than there are, or a dtype that is no float.
  """
  if (folder / INDEX).exists():
    return _indexed(folder)
  if not (folder / SINGLE).exists():
    advice = not_read(file.name for file in folder.glob("*"))
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{advice}")
  return _tensors_of(folder / SINGLE)


def not_read(names: Iterable[str]) -> str:
  """Returns what to do about the pickles among a model's files, to follow what is wrong; "" where there are none."""
  pickles = sorted(name for name in names if name.endswith(PICKLES))
  if not pickles:
    return ""
  return (
    f"; {pickles[0]} is not read, since loading it can run code: convert it (transformers, in a place you trust: "
    "`AutoModel.from_pretrained(…).save_pretrained(…)` writes safetensors)"
  )


def _indexed(folder: Path) -> dict[str, Tensor]:
  index = folder / INDEX
  try:
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(places.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{index}: expected {{"weight_map": {{tensor: file}}}} ({error!r}); fetch it again') from error
  tensors: dict[str, Tensor] = {}
  for name in names:
    # A plain file name of this very folder: "../" or an absolute path would read whatever it likes.
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
      raise ValueError(f"{index} names {name!r}; only safetensors files in the same folder are read")
    if not (folder / name).exists():
      raise FileNotFoundError(f"{index} names {name}, which is missing; fetch it")
    tensors |= {key: tensor for key, tensor in _tensors_of(folder / name).items() if places.get(key) == name}
  if missing := sorted(set(places) - set(tensors)):
    raise ValueError(f"{index}: tensor {missing[0]!r} is not in {places[missing[0]]}; fetch both again")
  return tensors


def _tensors_of(file: Path) -> dict[str, Tensor]:
  try:
    with safetensors.safe_open(file, "np") as opened:
      found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
      headers = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in found.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
  return {name: Tensor(file, name, shape, DTYPES.get(dtype, dtype)) for name, (shape, dtype) in headers.items()}


def same(one: Tensor, other: Tensor) -> bool:
  """Says whether two tensors hold the same bytes."""
  if (one.shape, one.dtype) != (other.shape, other.dtype):
    return False
  return all(block.tobytes() == other.rows(at, at + len(block)).tobytes() for at, block in one.blocks())


class Writer:
  """Writes tensors into a folder's files, a new file whenever one is full; each file is read back and compared.

  Args:
    folder: exists.
    sizes: every tensor's bytes, in the order they will come.
    file_bytes: a file has at most this many, or one tensor.
  """

  def __init__(self, folder: Path, sizes: Mapping[str, int], file_bytes: int):
    self._folder, self._waiting, self._places = folder, {}, {}
    groups, room = [[]], file_bytes
    for name, size in sizes.items():
      if groups[-1] and size > room:
        groups.append([])
        room = file_bytes
      groups[-1].append(name)
      room -= size
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    self._files = {name: (file, group[-1]) for file, group in zip(names, groups, strict=True) for name in group}
    self._total = sum(sizes.values())

  def add(self, name: str, value: np.ndarray) -> None:
    """Takes the next tensor."""
    file, last = self._files[name]
    self._waiting[name] = np.ascontiguousarray(value)  # safetensors would write another order silently
    self._places[name] = file
    if name == last:
      self._write(self._folder / file)

  def _write(self, file: Path) -> None:
    part = file.with_suffix(".part")
    safetensors.numpy.save_file(self._waiting, part, metadata={"format": "pt"})
    for name, tensor in _tensors_of(part).items():
      value = self._waiting.pop(name)
      if tensor.shape != value.shape or any(
        block.tobytes() != value[at : at + len(block)].tobytes() for at, block in tensor.blocks()
      ):
        raise OSError(f"{file}: tensor {name!r} reads back differently; is the disk sound?")
    part.replace(file)

  def close(self) -> None:
    """Writes the index where there are several files."""
    if len(set(self._places.values())) > 1:
      index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._places.items()))}
      (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
