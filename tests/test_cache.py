"""The token cache: right, shared, and nothing of an interrupted build is ever read."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from data import cache
from data.cache import text_key, tokenised
from data.sources import texts_of
from data.tokenizer import byte_tokenizer, train_tokenizer

TEXTS = ["one two", "drei", "ünï" * 50] * 40


def made(folder, texts=TEXTS, tokenizer=None):
  texts = texts if hasattr(texts, "digest") else texts_of(texts)
  return tokenised("text", texts, tokenizer or byte_tokenizer(), folder)


def documents(tokens):
  return [part.tolist() for part in np.split(tokens.tokens, np.cumsum(tokens.lengths))[:-1]]


def test_it_holds_what_the_tokenizer_says(tmp_path):
  entry = made(tmp_path)
  assert documents(entry) == byte_tokenizer().encode_batch(TEXTS)
  assert isinstance(entry.tokens, np.memmap)


def test_a_second_time_nothing_is_encoded(tmp_path, monkeypatch):
  first = documents(made(tmp_path))
  monkeypatch.setattr(cache, "_encoded", lambda *_: pytest.fail("encoded again"))
  assert documents(made(tmp_path)) == first


def test_other_text_boundaries_or_tokenizer_are_other_entries(tmp_path):
  small = train_tokenizer(TEXTS, 300, 10)
  keys = {made(tmp_path).key, made(tmp_path, TEXTS[1:]).key, made(tmp_path, tokenizer=small).key}
  assert len(keys) == 3
  assert text_key(texts_of(["ab", "c"]), small) != text_key(texts_of(["a", "bc"]), small)


def test_no_documents_and_short_documents(tmp_path):
  assert documents(made(tmp_path, [])) == []
  assert documents(made(tmp_path, ["\u200b", "a"])) == byte_tokenizer().encode_batch(["\u200b", "a"])


@pytest.mark.parametrize("file", ["tokens.bin", "lengths.npy", "entry.json"])
def test_a_damaged_entry_is_made_again(tmp_path, file):
  entry = made(tmp_path)
  path = tmp_path / entry.key / file
  path.write_bytes(path.read_bytes()[:-1])
  if file == "entry.json":
    path.write_text("{")
  assert documents(made(tmp_path)) == byte_tokenizer().encode_batch(TEXTS)


class Slow:
  """Documents that take their time, so that a build can be interrupted."""

  def __init__(self, seconds):
    self.seconds = seconds

  def digest(self):
    return texts_of(TEXTS).digest()

  def read(self, skipped):
    for text in TEXTS:
      time.sleep(self.seconds)
      yield text


def build(folder, seconds, done):
  entry = made(folder, Slow(seconds))
  done.put((os.getpid(), documents(entry) == byte_tokenizer().encode_batch(TEXTS)))


def test_an_interrupted_build_leaves_nothing_that_is_read(tmp_path, monkeypatch):
  context = multiprocessing.get_context("fork")
  process = context.Process(target=build, args=(tmp_path, 0.01, context.Queue()))
  process.start()
  key = text_key(texts_of(TEXTS), byte_tokenizer())
  deadline = time.monotonic() + 60
  while not list((tmp_path / f"{key}.part").glob("tokens.bin*")):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  assert not (tmp_path / key).exists()
  assert documents(made(tmp_path)) == byte_tokenizer().encode_batch(TEXTS)
  assert not (tmp_path / f"{key}.part").exists()


def test_processes_that_build_at_once_agree(tmp_path):
  context = multiprocessing.get_context("fork")
  done = context.Queue()
  processes = [context.Process(target=build, args=(tmp_path, 0.002, done)) for _ in range(3)]
  for process in processes:
    process.start()
  results = [done.get(timeout=120) for _ in processes]
  for process in processes:
    process.join()
  assert len({pid for pid, _ in results}) == 3 and all(right for _, right in results)
  assert [json.loads(p.read_text())["documents"] for p in tmp_path.glob("*/entry.json")] == [len(TEXTS)]
