"""Sources: what a config names as data, opened as rows.

A source is a string, or a mapping with `path` and any of the other keys:

path      a file, folder or glob of `.jsonl`, `.txt`, `.csv`, `.tsv` (each also `.gz`, `.zst`) or `.parquet`;
          a folder that Hugging Face `save_to_disk` wrote; "hf:NAME" of the hub; "tfds:NAME" (array_record)
split     "train", "train[:90%]", "train[100:200]+test": Hugging Face's syntax, for every source; may be left
          out where there is one. Files of a folder belong to the split their name begins with, or else to "train"
fields    {"text": "body"}: field to use -> field of the row, or its path with dots
config    hf: name of the dataset's configuration
data_dir  tfds: where the dataset was prepared
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import SUFFIXES, open_file
from data.rows import BadRow, Chosen, Joined, Listed, Records, Renamed, Row, Rows

Source = str | Path | Mapping[str, Any]
KEYS = ("path", "split", "fields", "config", "data_dir")
BAD_ROWS = ("error", "skip")
SPLITS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
  **dict.fromkeys(("test", "testing"), "test"),
}


def open_rows(source: Source, cache: Path) -> Rows:
  """Opens a source.

  Args:
    source: see the top of this file.
    cache: folder for unpacked files.

  Returns:
    Its rows, none of them read yet.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: a key, split, form or field that cannot be.
  """
  settings = dict(source) if isinstance(source, Mapping) else {"path": source}
  if isinstance(settings.get("path"), Path):
    settings["path"] = str(settings["path"])
  if unknown := set(settings) - set(KEYS):
    raise ValueError(f"a source has unknown {sorted(unknown)}; known are {KEYS}; got {settings}")
  path, split, fields = settings.get("path"), settings.get("split") or "", settings.get("fields") or {}
  if not isinstance(path, str) or not path or "\0" in path:
    raise ValueError(f"a source needs `path`, a string; got {settings}")
  if others := [key for key in ("split", "config", "data_dir") if not isinstance(settings.get(key) or "", str)]:
    raise ValueError(f"a source's {others} must be strings; got {settings}")
  if not isinstance(fields, Mapping) or not all(isinstance(name, str) for pair in fields.items() for name in pair):
    raise ValueError(f"a source's `fields` must be an object of names, such as {{'text': 'body'}}; got {settings}")
  if path.startswith("hf:"):
    splits = _hub(path[3:], settings.get("config"), split)
  elif path.startswith("tfds:"):
    splits = _tfds(path[5:], settings.get("data_dir"))
  elif _saved_by_datasets(Path(path)):
    splits = _from_disk(Path(path))
  else:
    splits = _of_files(path, cache)
  rows = _take(splits, split, path)
  return Renamed(rows, fields) if fields else rows


def split_name(spec: str) -> list[str]:
  """Returns the names of the splits that a spec takes rows of.

  Example:
    >>> split_name("train[:10%]+test")
    ['train', 'test']
  """
  return [part.split("[")[0].strip() for part in spec.split("+")]


def _take(splits: Mapping[str, Rows], spec: str, path: str) -> Rows:
  if not spec and len(splits) > 1:
    raise ValueError(f"{path} has the splits {sorted(splits)}; say which: `split`, such as 'train' or 'train+test'")
  spec = spec or next(iter(splits))
  if unknown := [name for name in split_name(spec) if name not in splits]:
    raise ValueError(f"{path} has no split {unknown[0]!r}; it has {sorted(splits)}")
  if "[" not in spec:
    return Joined([splits[name] for name in split_name(spec)])
  import datasets  # slow to import; here for the meaning of its split syntax

  try:
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
  except (ValueError, AssertionError) as error:
    raise ValueError(f"{path}: split {spec!r} cannot be read ({error}); write such as train[:90%]") from error
  return Joined([Chosen(splits[part.splitname], range(part.from_ or 0, part.to)) for part in parts])


def files_of(path: str | Path) -> list[Path]:
  """Returns the files that a path, folder or glob means, sorted.

  Raises:
    FileNotFoundError: none; says what was expected.
    ValueError: a file of another form.
  """
  path = Path(path)
  if path.is_file() and not path.name.endswith(SUFFIXES):
    raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}; convert or rename it")
  found = [path] if path.is_file() else sorted(p for p in path.glob("[!.]*") if p.name.endswith(SUFFIXES))
  found = found or [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
  if not found:
    raise FileNotFoundError(f"no data in {path}: expected a file, folder or glob of {', '.join(SUFFIXES)}")
  return found


def _of_files(path: str, cache: Path) -> dict[str, Rows]:
  parts: dict[str, list[Rows]] = {}
  for file in files_of(path):
    word = re.match(r"[a-z]*", file.name.lower())[0] if Path(path).is_dir() else ""
    parts.setdefault(SPLITS.get(word, "train"), []).append(open_file(file, cache))
  return {name: Joined(rows) for name, rows in parts.items()}


def _saved_by_datasets(folder: Path) -> bool:
  return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _from_disk(folder: Path) -> dict[str, Rows]:
  import datasets

  loaded = datasets.load_from_disk(str(folder))
  several = isinstance(loaded, datasets.DatasetDict)
  parts = loaded if several else {"train": loaded}
  places = {name: folder / name if several else folder for name in parts}
  # The library keeps results of its own beside the data (`cache-….arrow`): they are no rows.
  files = {name: sorted(set(place.glob("*")) - set(place.glob("cache-*"))) for name, place in places.items()}
  return {name: _dataset_rows(part, f"{folder}:{name}", files[name], "") for name, part in parts.items()}


def _hub(name: str, config: str | None, split: str) -> dict[str, Rows]:
  """Loads a dataset of the hub, or a folder of files in the hub's form, by the hub's own library."""
  import datasets

  wanted = sorted(set(split_name(split))) if split else None
  try:
    if wanted:
      loaded = {part: datasets.load_dataset(name, config, split=part) for part in wanted}
    else:
      loaded = dict(datasets.load_dataset(name, config))
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise FileNotFoundError(
      f"hf:{name} cannot be loaded ({error}); check its name, config, split and network"
    ) from error
  rows = {}
  for part, dataset in loaded.items():
    files = [Path(file["filename"]) for file in dataset.cache_files]
    rows[part] = _dataset_rows(dataset, f"hf:{name}:{part}", files, f"{name} {config} {part}")
  return rows


def _dataset_rows(dataset: Any, name: str, files: Sequence[Path], version: str) -> Records:
  """Wraps a `datasets.Dataset`."""
  labels = {field: kind.names for field, kind in dataset.features.items() if type(kind).__name__ == "ClassLabel"}
  return Records(dataset, name, labels, files, version if files else f"{version} {dataset._fingerprint}")


def _tfds(name: str, data_dir: str | None) -> dict[str, Rows]:
  """Opens a dataset that TFDS has prepared as array_record; no TensorFlow is imported."""
  import tensorflow_datasets as tfds

  folder = str(Path(data_dir).expanduser()) if data_dir else None
  try:
    builder = tfds.builder(name, data_dir=folder)
    if not builder.is_prepared():
      builder.download_and_prepare(file_format="array_record")
    parts = {split: builder.as_data_source(split=split) for split in builder.info.splits}
  except (tfds.core.DatasetNotFoundError, NotImplementedError, ImportError, OSError, ValueError, RuntimeError) as error:
    raise FileNotFoundError(
      f"tfds:{name} cannot be opened in {folder or 'the default data_dir'} ({error}); prepare it there with "
      "`tfds build --file_format=array_record`"
    ) from error
  labels = {field: kind.names for field, kind in builder.info.features.items() if hasattr(kind, "int2str")}
  return {
    split: Records(rows, f"tfds:{name}:{split}", labels, [Path(p) for p in builder.info.splits[split].filepaths], "")
    for split, rows in parts.items()
  }


class Texts:
  """Documents: one field of rows, read when they are asked for.

  Args:
    rows: the rows.
    field: which field.
    bad_rows: "error" raises at a row without text; "skip" passes over it.
  """

  def __init__(self, rows: Rows, field: str = "text", bad_rows: str = "error"):
    if bad_rows not in BAD_ROWS:
      raise ValueError(f"config.data.bad_rows is {bad_rows!r}; known: {BAD_ROWS}")
    self.rows, self._field, self._bad_rows = rows, field, bad_rows

  def __len__(self) -> int:
    return len(self.rows)

  def __iter__(self) -> Iterator[str]:
    return self.read({})

  def read(self, skipped: dict[str, int]) -> Iterator[str]:
    """Yields the documents, and counts those that are skipped by their reason."""
    for number in range(len(self.rows)):
      try:
        text = self.document(number)
      except BadRow as bad:
        if self._bad_rows == "error":
          raise
        skipped[bad.reason] = skipped.get(bad.reason, 0) + 1
        continue
      yield text

  def document(self, number: int) -> str:
    """Returns a row's document; raises a BadRow where it gives none, whatever is done with such rows."""
    try:
      return string_field(self.rows.read(number), self._field)
    except BadRow:
      raise
    except ValueError as error:
      raise BadRow(self.rows.where(number), str(error)) from error

  def choose(self, numbers: Sequence[int] | range) -> "Texts":
    """Returns some of the documents."""
    return Texts(Chosen(self.rows, numbers), self._field, self._bad_rows)

  def digest(self) -> str:
    """Returns a hash of what is read."""
    return f"{self.rows.digest()} {self._field} {self._bad_rows}"


def texts_of(texts: Sequence[str], name: str = "list") -> Texts:
  """Returns documents that are in memory."""
  return Texts(Listed([{"text": text} for text in texts], name))


def open_texts(source: Source, cache: Path, bad_rows: str = "error") -> Texts:
  """Opens a source of documents.

  Raises:
    FileNotFoundError, ValueError: see `open_rows`; or it has no rows.
  """
  rows = open_rows(source, cache)
  if not len(rows):
    raise ValueError(f'{source} holds no documents; expected lines such as {{"text": "…"}} or paragraphs of text')
  return Texts(rows, "text", bad_rows)


def string_field(row: Row, field: str) -> str:
  """Returns a field of a row.

  Raises:
    ValueError: it is missing, empty, no string, or no text (half a surrogate pair); the caller knows the place.
  """
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    got = "nothing" if value is None else repr(value)[:60]
    raise ValueError(f"field {field!r} must be a non-empty string, got {got}; fields: {sorted(row)}")
  check_text(value, field)
  return value


def check_text(text: str, field: str) -> None:
  """Raises a ValueError where a field's value is no text: half a surrogate pair, which no file can hold."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"field {field!r} holds half a surrogate pair ({error}); mend the line") from error
