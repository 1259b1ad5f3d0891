"""Files of rows: `.jsonl`, `.txt`, `.csv`, `.tsv`, `.parquet`, and compressed ones.

Text formats are memory-mapped, with an index of where each record begins; compressed files are unpacked into the cache.
"""

import contextlib
import csv
import errno
import functools
import io
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from data.rows import BadRow, Row, Rows, content_digest, hash_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCANNED = 1 << 24  # bytes looked at at a time


class TextFile(Rows):
  """A file of records that stand one after the other in bytes.

  Args:
    file: plain bytes in UTF-8.
    name: how errors call it.
  """

  def __init__(self, file: Path, name: str):
    self._file, self._name = file, name
    with file.open("rb") as stream:
      self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
    self._begins, self._stops = self._index()

  def _index(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the records begin and stop."""
    raise NotImplementedError

  def __len__(self) -> int:
    return len(self._begins)

  def where(self, number: int) -> str:
    return self._place(int(self._begins[number]))

  def _place(self, at: int) -> str:
    return f"{self._name}:{int(np.searchsorted(self._newlines, at)) + 1}"

  @functools.cached_property
  def _newlines(self) -> np.ndarray:
    """Where the newlines are: int64 [lines]."""
    ends = [
      np.flatnonzero(np.frombuffer(self._bytes[at : at + _SCANNED], np.uint8) == 10) + at
      for at in range(0, len(self._bytes), _SCANNED)
    ]
    return np.concatenate([np.zeros(0, np.int64), *ends])

  def digest(self) -> str:
    return hash_of(type(self).__name__, content_digest(self._file))

  def text(self, number: int) -> str:
    """Returns a record as it stands in the file; raises a `BadRow` where it is not UTF-8."""
    begin = int(self._begins[number])
    raw = self._bytes[begin : int(self._stops[number])]
    try:
      return raw.decode("utf-8-sig" if begin == 0 else "utf-8")
    except UnicodeDecodeError as error:
      raise BadRow(self._place(begin + error.start), f"not UTF-8 ({error})", "convert the file") from error

  def _lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where each line begins and stops, and whether it is blank."""
    stops = np.append(self._newlines, len(self._bytes))
    begins = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    blank = stops == begins
    first = np.frombuffer(self._bytes, np.uint8)[begins[~blank]] if len(self._bytes) else np.zeros(0, np.uint8)
    for line in np.flatnonzero(~blank)[(first <= 32) | (first == 0xEF)]:  # perhaps only spaces, or a byte order mark
      blank[line] = not self._bytes[begins[line] : stops[line]].removeprefix(b"\xef\xbb\xbf").strip()
    return begins, stops, blank


class JsonLines(TextFile):
  """`.jsonl`: an object a line; blank lines are passed over."""

  def _index(self) -> tuple[np.ndarray, np.ndarray]:
    begins, stops, blank = self._lines()
    return begins[~blank], stops[~blank]

  def read(self, number: int) -> Row:
    text = self.text(number)
    try:
      row = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is another ValueError
      raise BadRow(self.where(number), f"not a line of JSON ({error})", "mend or remove the line") from error
    if not isinstance(row, dict):
      raise BadRow(self.where(number), f"expected an object {{…}}, got {type(row).__name__}")
    return row


class Paragraphs(TextFile):
  """`.txt`: documents parted by blank lines; the field is `text`."""

  def _index(self) -> tuple[np.ndarray, np.ndarray]:
    begins, stops, blank = self._lines()
    after_blank = np.concatenate([[True], blank[:-1]])
    before_blank = np.concatenate([blank[1:], [True]])
    return begins[~blank & after_blank], stops[~blank & before_blank]

  def read(self, number: int) -> Row:
    return {"text": "\n".join(line.rstrip() for line in self.text(number).split("\n")).strip()}


class Table(TextFile):
  """`.csv` or `.tsv` with a line of names; every value is a string, as it stands."""

  def __init__(self, file: Path, name: str, delimiter: str):
    self._delimiter, self._cut = delimiter, 0
    csv.field_size_limit(2**31 - 1)  # documents are longer than the module's 128 KiB
    super().__init__(file, name)

  def digest(self) -> str:
    # The same bytes are other cells by another delimiter.
    found = super().digest() if self._delimiter == "," else hash_of(super().digest(), self._delimiter)
    # An older version read other rows, and cached their tokens.
    return hash_of(found, f"{self._cut} stray quotes") if self._cut else found

  def _index(self) -> tuple[np.ndarray, np.ndarray]:
    self._names, marks = [], [0]
    stream = io.BytesIO(self._bytes) if isinstance(self._bytes, bytes) else self._bytes
    position = 0

    def lines() -> Iterator[str]:
      nonlocal position
      while line := stream.readline():
        # Only ends of records are looked for; `text` names bad bytes. After a byte order mark quotes would be letters.
        form = "utf-8" if position else "utf-8-sig"
        position += len(line)
        yield line.decode(form, "replace")

    try:
      while position < len(self._bytes):  # a reader ends for good at a quote that is never closed
        for cells in csv.reader(lines(), delimiter=self._delimiter):
          begin = abs(marks[-1])
          line = self._bytes.find(b"\n", begin, position) + 1
          if not self._names and cells:
            self._names = [cell.strip() for cell in cells]
            marks = [position]
            continue
          if 0 < line < position and self._swallows(self._bytes[begin:position].decode("utf-8", "replace")):
            stream.seek(line)  # the line of the stray quote alone is a bad row
            position, self._cut = line, self._cut + 1
          marks.append(position if cells else -position)  # a blank line is no record
    except csv.Error as error:
      raise ValueError(f"{self._name}: not a table ({error}); mend the file") from error
    at = np.array(marks, np.int64)
    records = at[1:] > 0
    if not self._names or len(set(self._names)) < len(self._names):
      raise ValueError(f"{self._name}: the first line must name the columns, each once; got {self._names}")
    return np.abs(at[:-1])[records], at[1:][records]

  def _swallows(self, record: str) -> bool:
    """Says whether a record of several lines is a stray quote and the rows after it, not a cell of several lines."""
    first, *rest = [line for line in record.split("\n") if line.strip()]
    if not self._fits(record):  # then the lines after the first may still be rows
      return 2 * sum(map(self._fits, rest)) > len(rest)
    # It is well-formed; but where it is made of rows each line has all delimiters, while lines of a cell share those of
    # one row, and the text between hardly has as many tabs. It may have as many commas: but not in each of five lines,
    # and without a space after any.
    rows = (line.split(self._delimiter) for line in (first, *rest))
    if self._delimiter == "\t":
      return all(len(cells) == len(self._names) > 1 for cells in rows)
    return len(rest) >= 4 and all(
      len(cells) == len(self._names) > 1 and all(cell[:1].strip() for cell in cells[1:]) for cells in rows
    )

  def _fits(self, text: str) -> bool:
    try:
      return len(self._cells(text)) == len(self._names)
    except csv.Error:
      return False

  def _cells(self, text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True), [])

  def read(self, number: int) -> Row:
    text = self.text(number)
    try:
      cells = self._cells(text)
    except csv.Error as error:
      advice = "close or double its quotes, or remove the line"
      raise BadRow(self.where(number), f"not a line of a table ({error})", advice) from error
    if len(cells) != len(self._names):
      raise BadRow(self.where(number), f"not one cell a column, got {len(cells)} for {self._names}", "quote commas")
    return dict(zip(self._names, cells, strict=True))


class Parquet(Rows):
  """`.parquet`; a row group is read at a time, and the last two are kept."""

  def __init__(self, file: Path, name: str):
    import pyarrow  # half a second to import, and only this format needs it
    import pyarrow.parquet

    self._file, self._name = file, name
    try:
      self._parquet = pyarrow.parquet.ParquetFile(file, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
      raise ValueError(f"{name}: not a parquet file ({error}); fetch or write it again") from error
    groups = self._parquet.metadata
    self._ends = np.cumsum([groups.row_group(i).num_rows for i in range(groups.num_row_groups)], dtype=np.int64)
    self._group = functools.lru_cache(maxsize=2)(self._parquet.read_row_group)

  def __len__(self) -> int:
    return self._parquet.metadata.num_rows

  def read(self, number: int) -> Row:
    group = int(np.searchsorted(self._ends, number, side="right"))
    inner = number - (int(self._ends[group - 1]) if group else 0)
    return self._group(group).slice(inner, 1).to_pylist()[0]

  def where(self, number: int) -> str:
    return f"{self._name}, row {number + 1}"

  def digest(self) -> str:
    return hash_of("Parquet", content_digest(self._file))


FORMATS: dict[str, Callable[[Path, str], Rows]] = {
  ".jsonl": JsonLines,
  ".txt": Paragraphs,
  ".csv": functools.partial(Table, delimiter=","),
  ".tsv": functools.partial(Table, delimiter="\t"),
  ".parquet": Parquet,
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*FORMATS, *(form + packed for form in FORMATS if form != ".parquet" for packed in PACKED))


def put(file: Path, text: str) -> None:
  """Writes a file so that a reader, even after a power cut, sees the old one or the new one, never half of one."""
  with whole(file) as opened:
    opened.write(text.encode("utf-8"))


@contextlib.contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
  """Opens a file for bytes that takes its place when all of them are on the disk; its folder is made if missing."""
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_name(f"{file.name}.{os.getpid()}.part")  # processes may write the same at the same time
  try:
    with named(file), part.open("wb") as opened:
      yield opened
      opened.flush()
      os.fsync(opened.fileno())  # else the name may be on the disk before the bytes are
    os.replace(part, file)
  finally:
    part.unlink(missing_ok=True)  # what is left of an error may be what fills the disk


@contextlib.contextmanager
def named(file: Path) -> Iterator[None]:
  """Gives an error that there is no room for what is written the name of the file, which the system leaves out."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno in _FULL:
      error.filename = str(file)
    raise


def read_json(file: Path) -> Any:
  """Reads a file of JSON that `put` wrote.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged; says which file.
  """
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is damaged ({error}); put it back, or delete it and run again what wrote it") from error


def open_file(file: Path, cache: Path) -> Rows:
  """Opens a file by its suffix, one of `SUFFIXES`.

  Args:
    file: the file.
    cache: folder that compressed files are unpacked into, once for each content.

  Raises:
    ValueError: a suffix that is not known, or a damaged file.
  """
  suffix = next((suffix for suffix in SUFFIXES[::-1] if file.name.endswith(suffix)), None)
  if suffix is None:
    raise ValueError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}; convert or rename it")
  form, _, packed = suffix[1:].partition(".")
  plain = unpacked(file, PACKED[f".{packed}"], cache) if packed else file
  return FORMATS[f".{form}"](plain, str(file))


def unpacked(file: Path, compression: str, cache: Path) -> Path:
  """Returns a file with a compressed file's content."""
  folder = cache / "unpacked"
  folder.mkdir(parents=True, exist_ok=True)
  target = folder / content_digest(file)
  with FileLock(f"{target}.lock"):
    if not target.exists():
      for rest in folder.glob(f"{target.name}.*.part"):  # of a process that was killed
        rest.unlink()
      with whole(target) as plain:
        for block in _blocks(file, compression):
          plain.write(block)
  return target


def _blocks(file: Path, compression: str) -> Iterator[bytes]:
  import pyarrow  # its reader, unlike zstandard's, raises at a stream that was cut short

  try:
    with pyarrow.input_stream(str(file), compression=compression) as stream:
      while block := stream.read(_SCANNED):
        yield block
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"{file}: the compressed file is damaged ({error}); fetch it again") from error
