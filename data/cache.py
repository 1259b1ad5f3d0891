"""Tokenised text on disk, memory-mapped: made once for a text and a tokenizer, whoever asks for it.

FOLDER/KEY/tokens.bin    int32, the documents end to end        KEY is a hash of the text and of the tokenizer, so a
FOLDER/KEY/lengths.npy   int64, tokens of each document         changed file or tokenizer is another entry
FOLDER/KEY/entry.json    what it is; written last
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from data.tokenizer import Tokenizer

ENCODED_AT_ONCE = 1024  # documents
QUIET_SECONDS = 5.0  # work shorter than this needs no progress lines


class Tokens(NamedTuple):
  """Documents as tokens.

  Attributes:
    tokens: int32 [all tokens], the documents end to end.
    lengths: int64 [documents].
    key: the hash of the text and the tokenizer.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  key: str


def cache_folder(folder: str) -> Path:
  """Returns `config.data.cache_dir`; where it is empty, `$ARGOT_CACHE` or `~/.cache/argot`."""
  return Path(folder or os.environ.get("ARGOT_CACHE") or "~/.cache/argot").expanduser()


def tokenised(name: str, texts: Iterable[str], tokenizer: Tokenizer, folder: Path) -> Tokens:
  """Returns a text's tokens, from the cache or made now.

  Args:
    name: of the text, for the terminal.
    texts: the documents; iterated once for their hash, and once more to make an entry.
    tokenizer: the tokenizer.
    folder: of the cache. Processes that want the same entry at once wait for the first; what an interrupted one left
      is thrown away.

  Returns:
    Memory-mapped arrays.
  """
  key = text_key(texts, tokenizer)
  entry = folder / key
  folder.mkdir(parents=True, exist_ok=True)
  with FileLock(folder / f"{key}.lock"):
    if not _whole(entry):
      part = folder / f"{key}.part"
      for rest in (part, entry):  # of a process that was stopped; of a disk that was full
        shutil.rmtree(rest, ignore_errors=True)
      part.mkdir()
      _write(name, texts, tokenizer, part)
      os.replace(part, entry)
  size = json.loads((entry / "entry.json").read_text())["tokens"]
  tokens = np.memmap(entry / "tokens.bin", np.int32, "r") if size else np.zeros(0, np.int32)
  return Tokens(tokens, np.load(entry / "lengths.npy", mmap_mode="r"), key)


def text_key(texts: Iterable[str], tokenizer: Tokenizer) -> str:
  """Returns the hash of documents, boundaries included, and of a tokenizer."""
  state = hashlib.sha256(tokenizer.fingerprint().encode())
  for text in texts:
    content = text.encode("utf-8")
    state.update(len(content).to_bytes(8, "little"))
    state.update(content)
  return state.hexdigest()[:32]


def _whole(entry: Path) -> bool:
  try:
    expected = json.loads((entry / "entry.json").read_text())
    lengths = np.load(entry / "lengths.npy", mmap_mode="r")
    return (entry / "tokens.bin").stat().st_size == 4 * expected["tokens"] and len(lengths) == expected["documents"]
  except (OSError, ValueError, KeyError):
    return False


def _write(name: str, texts: Iterable[str], tokenizer: Tokenizer, folder: Path) -> None:
  lengths: list[np.ndarray] = []
  begin = said = time.monotonic()
  total = documents = 0
  with (folder / "tokens.bin").open("wb") as file:
    for encoded in _encoded(texts, tokenizer):
      for ids in encoded:
        file.write(ids.tobytes())
      lengths.append(np.array([len(ids) for ids in encoded], np.int64))
      documents, total = documents + len(encoded), total + int(lengths[-1].sum())
      if time.monotonic() - said > QUIET_SECONDS:
        said = time.monotonic()
        print(f"tokenising {name}: {documents:,} documents, {total / (said - begin):,.0f} tokens/s", flush=True)
    file.flush()
    os.fsync(file.fileno())
  np.save(folder / "lengths.npy", np.concatenate([np.zeros(0, np.int64), *lengths]))
  entry = {"name": name, "documents": documents, "tokens": total, "tokenizer": tokenizer.fingerprint()}
  (folder / "entry.json").write_text(json.dumps(entry) + "\n")


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
  """Encodes batch by batch: lists of Python numbers are many times larger than arrays."""
  documents = iter(texts)
  while batch := list(itertools.islice(documents, ENCODED_AT_ONCE)):
    yield [np.array(ids, np.int32) for ids in tokenizer.encode_batch(batch)]
