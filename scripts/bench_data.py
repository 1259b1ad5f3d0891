"""Measures the data engine in one run: tokens per second of CPU time, one process, beside the libraries it builds on.

  python -m scripts.bench_data --corpus=my_domain/corpus.jsonl [--tokenizer=FOLDER] [--rows=64] [--seconds=3]

Each line is the median of five runs. CPU seconds are counted over all threads, so a figure is per core. Memory is the
peak of a process of its own that reads the corpus, and ten times the corpus, through the cache.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np

from configs.base import get_config
from data.cache import cache_folder, tokenised
from data.components import corpus_component
from data.features import CONVERTERS, Example, capacity
from data.objectives import OBJECTIVES, ObjectiveSettings
from data.pipeline import Stream, layout_of, pack_all
from data.sources import Texts, open_texts
from data.tokenizer import Tokenizer, load_tokenizer
from scripts import flags

SHAPES = {"next_token": ("gpt", 0, 1024), "span_corruption": ("t5", 512, 114)}
RUNS = 5


def main(arguments: list[str]) -> None:
  """Prints a Markdown table."""
  values = flags.new()
  flags.string(values, "corpus", None, "text: what data/sources.py reads")
  flags.string(values, "tokenizer", "bytes", "see config.tokenizer.path")
  flags.integer(values, "rows", 64, "rows in a batch")
  flags.integer(values, "seconds", 3, "least time of a run")
  values = flags.parse(values, "bench_data", __doc__, arguments, ["corpus"])
  tokenizer, texts = load_tokenizer(values.tokenizer), open_texts(values.corpus, cache_folder(""))
  with tempfile.TemporaryDirectory() as folder:
    os.environ["ARGOT_CACHE"] = folder
    lines = [*_tokenising(texts, tokenizer, folder), *_objectives(values, texts, tokenizer)]
    lines += _packing(values, texts, tokenizer)
    lines += _memory(values, folder)
  print("\n| what | figure |\n|---|---|")
  for what, figure in lines:
    print(f"| {what} | {figure} |")


def speed(run: Callable[[], int], seconds: float) -> float:
  """Returns tokens a CPU second: the median of `RUNS` runs, each repeated for a while; `run` returns its tokens."""
  run()
  found = []
  for _ in range(RUNS):
    begin, wall, tokens = time.process_time(), time.monotonic(), 0
    while not tokens or time.monotonic() - wall < seconds / RUNS:
      tokens += run()
    found.append(tokens / (time.process_time() - begin))
  return statistics.median(found)


def _tokenising(texts: Texts, tokenizer: Tokenizer, folder: str) -> Iterator[tuple[str, str]]:
  some = texts.choose(range(max(len(texts) // 10, 1)))
  plain = list(some)

  def cached() -> int:
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
      return int(tokenised("text", some, tokenizer, Path(fresh)).lengths.sum())

  def library() -> int:
    return sum(len(ids) for ids in tokenizer.encode_batch(plain))

  ours, theirs = speed(cached, 0), speed(library, 0)
  yield "tokenising into the cache", _figure(ours)
  yield "the `tokenizers` library alone", f"{_figure(theirs)} (ours {ours / theirs:.2f} ×)"


def _objectives(values, texts: Texts, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
  for objective, (architecture, encoder, decoder) in SHAPES.items():
    tokens, rng = np.arange(568, dtype=np.int32), np.random.default_rng(0)
    settings = ObjectiveSettings(tokenizer.eos_id, tokenizer.sentinel_ids)
    make = OBJECTIVES[objective].make

    def alone(make=make, tokens=tokens, rng=rng, settings=settings) -> int:
      for _ in range(100):
        make(tokens, rng, settings, True)
      return 100 * len(tokens)

    yield f"{objective}, 568 tokens", _figure(speed(alone, values.seconds))
    stream = build(texts, tokenizer, objective, architecture, encoder, decoder, values.rows)

    def batches(stream=stream) -> int:
      return real_tokens(next(stream))

    rows = f"{values.rows} rows of {encoder or decoder}"
    yield f"cache to batches, {objective} ({architecture}, {rows})", _figure(speed(batches, values.seconds))


def build(
  texts: Texts, tokenizer: Tokenizer, objective: str, architecture: str, encoder: int, decoder: int, rows: int
) -> Stream:
  """Builds the stream of one text."""
  config = get_config()
  config.architecture = architecture
  config.data.update({"objective": objective, "encoder_length": encoder, "decoder_length": decoder})
  component = corpus_component("text", texts, tokenizer, config)
  return Stream([component], [(1.0,)], layout_of(config, tokenizer), rows, seed=0)


def real_tokens(batch: dict[str, np.ndarray]) -> int:
  """Returns the tokens of a batch that are not padding, on both sides."""
  return sum(int((array > 0).sum()) for key, array in batch.items() if key.endswith("segment_ids"))


def _packing(values, texts: Texts, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
  """Packs the same documents, cut to a row, by ours and by Grain's first-fit packer."""
  config = get_config()
  config.data.update({"objective": "next_token", "decoder_length": SHAPES["next_token"][2]})
  layout = layout_of(config, tokenizer)
  row = capacity(layout)[0]
  documents = [
    np.array(ids[:row], np.int32)
    for ids in tokenizer.encode_batch(list(texts.choose(range(min(len(texts), 4000)))))
    if ids
  ]
  examples = [Example(np.zeros(0, np.int32), ids) for ids in documents]

  def ours() -> int:
    convert = CONVERTERS[layout.architecture]
    return sum(real_tokens(convert(rows, layout)) for rows in pack_all(examples, layout, values.rows))

  def grains() -> int:
    source = grain.MapDataset.source([{"tokens": ids} for ids in documents]).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
      source, length_struct={"tokens": row}, num_packing_bins=values.rows
    )
    return sum(int((part["tokens_segment_ids"] > 0).sum()) for part in packed)

  fast, slow = speed(ours, values.seconds), speed(grains, values.seconds)
  yield f"packing documents into {values.rows} rows of {row}", _figure(fast)
  yield "Grain's FirstFitPackIterDataset, the same", f"{_figure(slow)} (ours {fast / slow:.1f} ×)"


def _memory(values, folder: str) -> Iterator[tuple[str, str]]:
  context = multiprocessing.get_context("spawn")
  for times in (1, 10):
    path = Path(folder) / f"{times}.jsonl"
    with path.open("wb") as file:
      for _ in range(times):
        file.write(Path(values.corpus).read_bytes())
    results = context.Queue()
    process = context.Process(target=_peak, args=(str(path), values.tokenizer, values.rows, results))
    process.start()
    process.join()
    yield f"peak memory, corpus of {path.stat().st_size / 2**20:,.0f} MiB", f"{results.get() / 2**20:,.0f} MiB"


def _peak(corpus: str, tokenizer: str, rows: int, results) -> None:
  """Measures the most memory of a process's own; pages of mapped files are the system's, which takes them back."""
  most, done = 0, threading.Event()

  def watch() -> None:
    nonlocal most
    while not done.wait(0.02):
      status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
      most = max(most, int(status["RssAnon"].split()[0]) * 1024)

  watcher = threading.Thread(target=watch)
  watcher.start()
  stream = build(open_texts(corpus, cache_folder("")), load_tokenizer(tokenizer), "next_token", "gpt", 0, 1024, rows)
  for _ in range(50):
    next(stream)
  done.set()
  watcher.join()
  results.put(most)


def _figure(tokens_a_second: float) -> str:
  return f"{tokens_a_second / 1e6:.2f} M tokens/s"


if __name__ == "__main__":
  main(sys.argv[1:])
