"""Rows: read when they are asked for, in any order, never all at once.

A row is a dict of plain values; whatever is wrong with it is said with its place, when it is read.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


class BadRow(ValueError):
  """A row that cannot be used.

  Attributes:
    reason: in a few words, the same for all rows with this fault; to count by.
  """

  def __init__(self, where: str, reason: str, advice: str = ""):
    super().__init__(f"{where}: {reason}{f'; {advice}' if advice else ''}")
    # A label may have brackets, too: only those at the end tell more of this row.
    self.reason = reason.split(" (" if reason.endswith(")") else ", got")[0]


class Rows(Sequence[Row]):
  """Rows by number: `len(rows)`, `rows[3]`, iteration; `rows[2:5]` is a list.

  Reading a row raises `BadRow` if it is broken, and leaves the others readable.
  """

  def __getitem__(self, number):
    if isinstance(number, slice):
      return [self.read(i) for i in range(*number.indices(len(self)))]
    if not 0 <= number < len(self):
      raise IndexError(f"row {number} of {len(self)}")  # ends an iteration
    return self.read(int(number))

  def __iter__(self) -> Iterator[Row]:
    return map(self.read, range(len(self)))

  def spread(self, most: int) -> list[Row]:
    """Returns up to `most` rows from all over, in their order, always the same ones; 0 = all.

    One is drawn of each of `most` equal parts, so that files sorted by label give rows of all, and files whose labels
    take turns do, too.
    """
    if not 0 < most < len(self):
      return self[:]
    edges = np.arange(most + 1) * len(self) // most
    return [self[number] for number in np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()]

  def read(self, number: int) -> Row:
    """Returns a row."""
    raise NotImplementedError

  def where(self, number: int) -> str:
    """Says where a row stands, such as `FILE:LINE`."""
    raise NotImplementedError

  def digest(self) -> str:
    """Returns a hash of the content; equal hashes mean equal rows in equal order."""
    raise NotImplementedError


class Listed(Rows):
  """Rows in memory."""

  def __init__(self, rows: Sequence[Row], name: str = "list"):
    self._rows, self._name = rows, name

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, number: int) -> Row:
    return self._rows[number]

  def where(self, number: int) -> str:
    return f"{self._name}, row {number + 1}"

  def digest(self) -> str:
    return hash_of("Listed", *(json.dumps(row, sort_keys=True) for row in self._rows))


class Joined(Rows):
  """Several rows one after the other."""

  def __init__(self, parts: Sequence[Rows]):
    self._parts = parts
    self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def _find(self, number: int) -> tuple[Rows, int]:
    part = int(np.searchsorted(self._ends, number, side="right"))
    return self._parts[part], int(number - (self._ends[part - 1] if part else 0))

  def read(self, number: int) -> Row:
    part, inner = self._find(number)
    return part.read(inner)

  def where(self, number: int) -> str:
    part, inner = self._find(number)
    return part.where(inner)

  def digest(self) -> str:
    return hash_of(*(part.digest() for part in self._parts))


class Chosen(Rows):
  """Some of the rows, by number: a split, or those that are not held out."""

  def __init__(self, rows: Rows, numbers: Sequence[int] | np.ndarray | range):
    self._rows, self._numbers = rows, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def read(self, number: int) -> Row:
    return self._rows.read(int(self._numbers[number]))

  def where(self, number: int) -> str:
    return self._rows.where(int(self._numbers[number]))

  def digest(self) -> str:
    numbers = self._numbers
    chosen = repr(numbers) if isinstance(numbers, range) else hashlib.sha256(np.asarray(numbers, np.int64)).hexdigest()
    return hash_of(self._rows.digest(), chosen)


class Renamed(Rows):
  """Rows whose fields are taken from others: `{"text": "document.body"}`; a dot goes into a field that has fields."""

  def __init__(self, rows: Rows, fields: Mapping[str, str]):
    self._rows, self._fields = rows, dict(fields)

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, number: int) -> Row:
    row = self._rows.read(number)
    return {**row, **{name: self._follow(row, path, number) for name, path in self._fields.items()}}

  def _follow(self, row: Row, path: str, number: int) -> Any:
    value: Any = row
    for part in [path] if path in row else path.split("."):
      if not isinstance(value, Mapping) or part not in value:
        raise BadRow(self.where(number), f"the row has no field {path!r}", f"it has {sorted(row)}")
      value = value[part]
    return value

  def where(self, number: int) -> str:
    return self._rows.where(number)

  def digest(self) -> str:
    return hash_of(self._rows.digest(), json.dumps(self._fields, sort_keys=True))


class Records(Rows):
  """Rows that a library reads: a Hugging Face dataset or a TFDS data source.

  Args:
    source: rows by number, each a mapping.
    name: how errors call it.
    labels: field -> names of its classes, where rows hold their numbers.
    files: what the rows are read from.
    version: what else the content depends on.
  """

  def __init__(
    self, source: Sequence[Any], name: str, labels: Mapping[str, Sequence[str]], files: Sequence[Path], version: str
  ):
    self._source, self._name, self._labels, self._files, self._version = source, name, labels, files, version

  def __len__(self) -> int:
    return len(self._source)

  def read(self, number: int) -> Row:
    row = {key: _plain(value) for key, value in self._source[number].items()}
    for field, names in self._labels.items():
      if row.get(field) is not None:
        row[field] = names[row[field]] if row[field] >= 0 else None  # -1 stands for "no label"
    return row

  def where(self, number: int) -> str:
    return f"{self._name}, row {number + 1}"

  def digest(self) -> str:
    return hash_of(self._version, *(content_digest(file) for file in self._files))


def _plain(value: Any) -> Any:
  """Returns bytes as text and numpy's scalars as Python's."""
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  return value.item() if isinstance(value, np.generic) else value


def content_digest(file: Path) -> str:
  """Returns a hash of a file's bytes; a file that has not been touched is read once in a process."""
  found = file.stat()
  return _content_digest(file, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _content_digest(file: Path, size: int, modified: int) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def hash_of(*parts: str) -> str:
  """Returns a hash of texts."""
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
