"""Text and rows from local files: documents for the corpora, rows for the tasks. Errors name file and line."""

import glob
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")


def files_of(path: str | Path) -> list[Path]:
  """Returns the files that a path, folder or glob means, sorted.

  Raises:
    FileNotFoundError: none; says what was expected.
  """
  path = Path(path)
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
      texts += [_string(row, "text", f"{file}:{line}") for line, row in read_rows(file)]
    else:
      with _open(file) as stream:
        texts += [block.strip() for block in stream.read().split("\n\n") if block.strip()]
  if not texts:
    raise ValueError(f"{path} holds no documents; expected lines such as {{\"text\": \"…\"}} or paragraphs of text")
  return texts


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line number and object of each line of a `.jsonl` file; blank lines are passed over.

  Raises:
    ValueError: a line that is not a JSON object, or not UTF-8, with file and line.
  """
  with _open(Path(file)) as stream:
    number = 0
    while True:
      number += 1
      try:
        line = stream.readline()
        if not line:
          return
        if not line.strip():
          continue
        row = json.loads(line)
      except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}:{number}: not a line of JSON in UTF-8 ({error}); mend or remove the line") from error
      if not isinstance(row, dict):
        raise ValueError(f"{file}:{number}: expected an object {{…}}, got {type(row).__name__}")
      yield number, row


def _open(file: Path):
  try:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{file} is missing") from error


def _string(row: dict[str, Any], field: str, where: str) -> str:
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    got = "nothing" if value is None else repr(value)[:60]
    raise ValueError(f"{where}: field {field!r} must be a non-empty string, got {got}; fields: {sorted(row)}")
  return value
