"""Tokenised text on disk, memory-mapped: made once for a text and a tokenizer, whoever asks for it.

FOLDER/KEY/tokens.bin    the documents end to end: uint16, or      KEY is a hash of the text and of the tokenizer, so a
                         int32 for vocabularies beyond 65,536      changed file or tokenizer is another entry
FOLDER/KEY/lengths.npy   int64, tokens of each document
FOLDER/KEY/entry.json    what it is, what was skipped; written last
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from filelock import FileLock

from data.files import whole
from data.tokenizer import Tokenizer

ENCODED_AT_ONCE = 1 << 20  # characters
_FORM = 2  # of an entry; another form is another entry
QUIET_SECONDS = 5.0  # work shorter than this needs no progress lines


class Tokens(NamedTuple):
  """Documents as tokens.

  Attributes:
    tokens: uint16 or int32 [all tokens], the documents end to end.
    lengths: int64 [documents].
    key: the hash of the text and the tokenizer.
    skipped: reason -> rows that gave no document.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  key: str
  skipped: Mapping[str, int]


def cache_folder(folder: str) -> Path:
  """Returns `config.data.cache_dir`; where it is empty, `$ARGOT_CACHE` or `~/.cache/argot`."""
  return Path(folder or os.environ.get("ARGOT_CACHE") or "~/.cache/argot").expanduser()


def programs_folder(folder: str) -> Path:
  """Returns where compiled programs are kept for this machine, within `cache_folder(folder)`.

  A home folder is often shared by machines of several kinds, and a CPU's program holds instructions that another CPU
  may lack: each kind has a folder of its own.
  """
  kind = f"{platform.machine()} {platform.processor()}"
  with contextlib.suppress(OSError):  # there where Linux is
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return cache_folder(folder) / "compiled" / f"{platform.machine()}-{zlib.crc32(kind.encode()):08x}"


class Documents(Protocol):
  """What can be tokenised: `data.sources.Texts`, or the prompts and answers of a task."""

  def digest(self) -> str:
    """Returns a hash of what `read` yields."""

  def read(self, skipped: dict[str, int]) -> Iterator[str]:
    """Yields the documents; counts rows that give none by their reason."""


def tokenised(name: str, texts: Documents, tokenizer: Tokenizer, folder: Path) -> Tokens:
  """Returns a text's tokens, from the cache or made now.

  Args:
    name: of the text, for the terminal.
    texts: the documents.
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
  about, dtype = json.loads((entry / "entry.json").read_text()), _dtype(tokenizer)
  tokens = np.memmap(entry / "tokens.bin", dtype, "r") if about["tokens"] else np.zeros(0, dtype)
  return Tokens(tokens, np.load(entry / "lengths.npy", mmap_mode="r"), key, about["skipped"])


def text_key(texts: Documents, tokenizer: Tokenizer) -> str:
  """Returns the hash of documents and of a tokenizer."""
  return hashlib.sha256(f"{_FORM} {tokenizer.fingerprint()} {texts.digest()}".encode()).hexdigest()[:32]


def _dtype(tokenizer: Tokenizer) -> type:
  return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def _whole(entry: Path) -> bool:
  try:
    expected = json.loads((entry / "entry.json").read_text())
    lengths = np.load(entry / "lengths.npy", mmap_mode="r")
    return (entry / "tokens.bin").stat().st_size == expected["bytes"] and len(lengths) == expected["documents"]
  except (OSError, ValueError, KeyError):
    return False


def _write(name: str, texts: Documents, tokenizer: Tokenizer, folder: Path) -> None:
  lengths: list[np.ndarray] = []
  skipped: dict[str, int] = {}
  begin = said = time.monotonic()
  total = documents = 0
  with whole(folder / "tokens.bin") as file:
    for encoded in _encoded(texts.read(skipped), tokenizer):
      for ids in encoded:
        file.write(ids.tobytes())
      lengths.append(np.array([len(ids) for ids in encoded], np.int64))
      documents, total = documents + len(encoded), total + int(lengths[-1].sum())
      if time.monotonic() - said > QUIET_SECONDS:
        said = time.monotonic()
        print(f"tokenising {name}: {documents:,} documents, {total / (said - begin):,.0f} tokens/s", flush=True)
  np.save(folder / "lengths.npy", np.concatenate([np.zeros(0, np.int64), *lengths]))
  entry = {"name": name, "documents": documents, "tokens": total, "bytes": (folder / "tokens.bin").stat().st_size}
  entry |= {"skipped": skipped, "tokenizer": tokenizer.fingerprint()}
  (folder / "entry.json").write_text(json.dumps(entry) + "\n")


def _encoded(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
  """Encodes batch by batch: what a tokenizer makes of a text is a hundred times as large as the ids alone."""
  dtype, batch, size = _dtype(tokenizer), [], 0
  for document in documents:
    batch.append(document)
    size += len(document)
    if size >= ENCODED_AT_ONCE:
      yield [np.array(ids, dtype) for ids in tokenizer.encode_batch(batch)]
      batch, size = [], 0
  if batch:
    yield [np.array(ids, dtype) for ids in tokenizer.encode_batch(batch)]
