"""The manifest of a checkpoint: what every file of it must hold, written before the checkpoint counts as one.

manifest.json: {"format": 1, "step", "created", "files": {path in the step's folder: [bytes, XXH3-128]},
                "config", "input": fingerprints, "versions": {library: version}}
"""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 1  # raised when an older Argot could not read what a newer one wrote
NAME = "manifest.json"
CHANGED_BY_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them last; nothing is read from them
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write(folder: Path, step: int, config: Any, data: Any) -> None:
  """Writes the manifest of a step's folder, and waits until it is on the disk.

  Args:
    folder: holds everything but the manifest.
    step: steps done.
    config: of the run, JSON-able; its fingerprint is kept.
    data: what the run knows of its input, JSON-able; its fingerprint is kept.
  """
  files = {name: list(_sum(folder / name)) for name in _files(folder)}
  value = {
    "format": FORMAT,
    "step": step,
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "config": fingerprint(config),
    "input": fingerprint(data),
    "versions": {name: metadata.version(name) for name in LIBRARIES},
    "files": files,
  }
  part = folder / (NAME + ".part")
  with part.open("w", encoding="utf-8") as file:
    json.dump(value, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, folder / NAME)
  sync(folder)


def sync(folder: Path) -> None:
  """Waits until the names in a folder are on the disk."""
  opened = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


def fingerprint(value: Any) -> str:
  """Returns a hash of a JSON-able value; the order of keys does not count.

  Example:
    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
  """
  return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def read(folder: Path) -> dict[str, Any]:
  """Returns the manifest of a step's folder.

  Raises:
    ValueError: there is none, it is damaged, or a newer Argot wrote it (then a `NewerFormat`).
  """
  try:
    value = json.loads((folder / NAME).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"{NAME} is missing") from None
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{NAME} cannot be read ({error})") from error
  if not isinstance(value, Mapping) or not isinstance(value.get("format"), int):
    raise ValueError(f"{NAME} has no `format`")
  if value["format"] > FORMAT:
    raise NewerFormat(
      f"{folder} was written by a newer Argot: its format is {value['format']}, this one reads up to {FORMAT}; update "
      "Argot, or go back to an older checkpoint with `argot checkpoints`"
    )
  files = value.get("files")
  if not isinstance(files, Mapping) or not files or not all(_is_sum(found) for found in files.values()):
    raise ValueError(f"{NAME} lists no files")
  return dict(value)


class NewerFormat(ValueError):
  """A newer Argot wrote this; an older checkpoint would not be what the user expects."""


def problem(folder: Path, whole: bool = True) -> str:
  """Says what is wrong with a step's folder, as `damage` does; what cannot be read counts as wrong."""
  try:
    return damage(folder, whole)
  except OSError as error:
    return f"it cannot be read ({error})"


def damage(folder: Path, whole: bool = True) -> str:
  """Says what is wrong with a step's folder, in words; "" = nothing.

  Args:
    folder: of the step.
    whole: reads every byte; else only names and sizes are compared.

  Raises:
    NewerFormat: a newer Argot wrote it.
    OSError: a file is there and cannot be read: it may be whole.
  """
  try:
    files = read(folder)["files"]
  except NewerFormat:
    raise
  except ValueError as error:
    if isinstance(error.__cause__, OSError):
      raise error.__cause__ from error
    return str(error)
  for name, (size, digest) in files.items():
    if Path(name).is_absolute() or ".." in Path(name).parts:
      return f"{NAME} names {name!r}, which is not in the folder"
    try:
      found = (folder / name).stat().st_size
      if found != size:
        return f"{name} has {found:,} bytes, {size:,} were written"
      if whole and _sum(folder / name)[1] != digest:
        return f"{name} holds other bytes than were written"
    except FileNotFoundError:
      return f"{name} is missing"
  return ""


def _files(folder: Path) -> list[str]:
  names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
  return sorted(name for name in names if name not in CHANGED_BY_COMMIT)


def _sum(file: Path) -> tuple[int, str]:
  with file.open("rb") as opened:
    digest = hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
  return file.stat().st_size, digest


def _is_sum(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], str)
