"""Text and rows from local files: documents for the corpora, rows for the tasks. Errors name file and line."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")


def files_of(path: str | Path) -> list[Path]:
  """Returns the files that a path, folder or glob means, sorted.

  Raises:
    FileNotFoundError: none; says what was expected.
    ValueError: a file of another form.
  """
  path = Path(path)
  if path.is_file() and not path.name.endswith(_SUFFIXES):
    raise ValueError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}; convert or rename it")
  found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.name.endswith(_SUFFIXES))
  found = found or [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
  if not found:
    raise FileNotFoundError(f"no text in {path}: expected a file, folder or glob of {', '.join(_SUFFIXES)}")
  return found


def read_texts(path: str | Path) -> list[str]:
  """Reads documents.

  Args:
    path: `.jsonl` (field `text`) or `.txt` (documents between blank lines), also `.gz`; or a folder or glob of them.

  Returns:
    The documents, in the order of files and lines.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a malformed or empty line, with file and line.
  """
  texts: list[str] = []
  for file in files_of(path):
    if ".jsonl" in file.suffixes:
      texts += [string_field(row, "text", f"{file}:{line}") for line, row in read_rows(file)]
    else:
      text = "\n".join(line.rstrip() for _, line in _lines(file))
      texts += [block.strip() for block in re.split(r"\n\n+", text) if block.strip()]
  if not texts:
    raise ValueError(f'{path} holds no documents; expected lines such as {{"text": "…"}} or paragraphs of text')
  return texts


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line number and object of each line of a `.jsonl` file; blank lines are passed over.

  Raises:
    ValueError: a line that is not a JSON object, or not UTF-8, with file and line.
  """
  for number, line in _lines(Path(file)):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
      raise ValueError(f"{file}:{number}: not a line of JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
      raise ValueError(f"{file}:{number}: expected an object {{…}}, got {type(row).__name__}")
    yield number, row


def _lines(file: Path) -> Iterator[tuple[int, str]]:
  """Yields number and text of each line; bytes are decoded line by line, so that an error names the right one."""
  number = 0
  try:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
      for number, raw in enumerate(stream, 1):
        yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{file} is missing") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{file}:{number}: not UTF-8 ({error}); convert the file") from error
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{file}:{number + 1}: the compressed file is damaged ({error}); fetch it again") from error


def string_field(row: dict[str, Any], field: str, where: str) -> str:
  """Returns a field of a row.

  Raises:
    ValueError: it is missing, empty, no string, or no text (half a surrogate pair); `where` says in which line.
  """
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    got = "nothing" if value is None else repr(value)[:60]
    raise ValueError(f"{where}: field {field!r} must be a non-empty string, got {got}; fields: {sorted(row)}")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: field {field!r} holds half a surrogate pair ({error}); mend the line") from error
  return value
