"""Components of the mixture: a task's rows, or an unlabelled text, as numbered examples."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.cache import cache_folder, tokenised
from data.features import Layout, capacity
from data.objectives import MODES, OBJECTIVES, ObjectiveSettings, raw_length
from data.prompts import frame_of, nested_labels, render
from data.sources import Texts
from data.tasks import Task, TaskRows, read_task_rows
from data.tokenizer import Tokenizer

SHORTEST_REST = 16  # tokens: less would teach nothing
LOOKED_AT = 2048  # examples of a source, evenly spaced, whose targets are counted for `usual_targets`
_SEED = 20_200_602  # of what is random about those


class Component(NamedTuple):
  """One source of the mixture.

  Attributes:
    name: in the mixture.
    size: examples in a pass.
    make: `(index below size, rng) -> (inputs, targets)`.
    digest: of the content.
    where: `index -> where that example comes from`, such as `FILE:LINE`.
    counts: rows `read`, `skipped` (in all, and by reason) and `truncated`.
    notes: what the user should know about it.
  """

  name: str
  size: int
  make: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
  digest: str
  where: Callable[[int], str]
  counts: Mapping[str, int]
  notes: Sequence[str] = ()


def usual_targets(component: Component) -> float:
  """Returns the target tokens of an example of a component, on average, over all of it or `LOOKED_AT` examples.

  A pure function of the component: what is random about an example (hidden spans, templates) is drawn by its number.
  """
  numbers = np.unique(np.linspace(0, component.size - 1, LOOKED_AT).astype(np.int64))
  made = (component.make(int(number), np.random.default_rng((_SEED, int(number)))) for number in numbers)
  return sum(len(targets) for _, targets in made) / len(numbers)


class Answers:
  """The prompts and answers of a task's rows, one after the other, each template's in turn; see `data.cache`."""

  def __init__(self, task: Task, rows: TaskRows):
    self._task, self._rows = task, rows

  def digest(self) -> str:
    return f"{self._rows.digest()} {json.dumps(self._task.asked(), sort_keys=True)}"

  def read(self, skipped: dict[str, int]) -> Iterator[str]:
    skipped |= self._rows.skipped
    for row in self._rows:
      for template in range(len(self._task.templates)):
        yield from render(self._task, row, template)


def task_component(task: Task, tokenizer: Tokenizer, layout: Layout, overlong: str, cache: Path) -> Component:
  """Encodes a task's training rows, once for each template; the template of an example is drawn.

  Raises:
    ValueError: an example is longer than a row and `overlong` is "error" (or not a known choice).
  """
  if overlong not in ("error", "skip", "truncate"):
    raise ValueError(f"config.data.overlong is {overlong!r}; known: ['error', 'skip', 'truncate']")
  rows = read_task_rows(task, "train")
  tokens, lengths, key, skipped = tokenised(task.name, Answers(task, rows), tokenizer, cache)
  templates, frame = len(task.templates), frame_of(task, tokenizer)
  framing = len(frame.prompt([], 0)), len(frame.answer([]))
  ends = np.cumsum(lengths, dtype=np.int64).reshape(len(rows), templates, 2)
  sizes = np.asarray(lengths).reshape(len(rows), templates, 2) + framing
  room = np.full(sizes.shape[:2], layout.encoder_length)
  if layout.architecture == "gpt":
    room = layout.decoder_length - sizes[..., 1]
  lost = ((sizes[..., 1] > layout.decoder_length) | (room <= framing[0])).any(axis=1)  # the answer alone is too long
  long = lost | (sizes[..., 0] > room).any(axis=1)
  if overlong == "error" and long.any():
    number = int(long.argmax())
    raise ValueError(_too_long(rows.where(number), sizes[number], layout))
  drop = long if overlong == "skip" else lost
  kept = np.flatnonzero(~drop)
  if not len(kept):
    raise ValueError(f"task {task.name!r}: every training row is longer than a row of {capacity(layout)} tokens")
  notes = [
    f"task {task.name}: in tokens, label {shorter!r} begins label {longer!r}; EOS tells them apart"
    for shorter, longer in nested_labels(task, tokenizer)
  ]
  skipped = dict(skipped) | ({"longer than a row": int(drop.sum())} if drop.any() else {})
  truncated = int((long & ~drop).sum())

  def make(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    row, template = kept[index], rng.integers(templates) if templates > 1 else 0
    (prompt, answer), (asked, answered) = ends[row, template], sizes[row, template] - framing
    prompt_ids, answer_ids = tokens[prompt - asked : prompt], tokens[answer - answered : answer]
    return (
      np.array(frame.prompt(prompt_ids, room[row, template]), np.int32),
      np.array(frame.answer(answer_ids), np.int32),
    )

  identity = f"{key} {hashlib.sha256(kept.tobytes()).hexdigest()[:8]} {truncated} truncated"
  counts = counts_of(len(rows) + sum(rows.skipped.values()), skipped, truncated)
  return Component(task.name, len(kept), make, identity, lambda index: rows.where(int(kept[index])), counts, notes)


def counts_of(read: int, skipped: Mapping[str, int], truncated: int = 0) -> dict[str, int]:
  """Returns what became of a source's rows, for the log and the report: what is 0 is left out.

  Example:
    >>> counts_of(10, {"not UTF-8": 1})
    {'read': 10, 'skipped': 1, 'skipped: not UTF-8': 1}
  """
  total = sum(skipped.values())
  counts = {"skipped": total, "truncated": truncated} | {f"skipped: {reason}": n for reason, n in skipped.items()}
  return {"read": read} | {key: n for key, n in counts.items() if n}


def _too_long(where: str, sizes: np.ndarray, layout: Layout) -> str:
  lengths = " or ".join(f"{prompt} + {answer}" for prompt, answer in sizes)
  return (
    f"{where}: the example has {lengths} tokens, a row holds {capacity(layout)}; raise "
    "data.encoder_length / data.decoder_length, or set data.overlong to 'truncate' (inputs lose their end) or 'skip'"
  )


def held_out_objective(config: ConfigDict) -> str:
  """Returns the objective that perplexity is measured under."""
  return config.evaluate.objective or config.data.objective


def form_of_pieces(objective: str, config: ConfigDict, tokenizer: Tokenizer) -> tuple[ObjectiveSettings, int]:
  """Returns what an objective needs to know, and the tokens of a piece that fills a row.

  Raises:
    ValueError: an unknown objective, settings that cannot be, rows too short for a text, or no sentinel for its spans.
  """
  data = config.data
  if not (0 < data.noise_density < 1 and data.mean_span_length >= 1):
    got = f"{data.noise_density} and {data.mean_span_length}"
    raise ValueError(f"data.noise_density must be between 0 and 1, data.mean_span_length at least 1; got {got}")
  modes = tuple(tuple(tokenizer.encode(mode)) for mode in MODES)
  settings = ObjectiveSettings(
    tokenizer.eos_id, tokenizer.sentinel_ids, data.noise_density, data.mean_span_length, modes
  )
  longest = raw_length(objective, config.architecture, data.encoder_length, data.decoder_length, settings)
  if not tokenizer.sentinel_ids and OBJECTIVES[objective].lengths(longest, settings).sentinels:
    raise ValueError(
      f"the objective {objective!r} puts sentinel tokens where it hides spans, and the tokenizer has none: set "
      "config.tokenizer.sentinels (100 is usual), take another tokenizer, or learn by next_token or prefix_lm"
    )
  return settings, longest


def corpus_component(
  name: str, texts: Texts, tokenizer: Tokenizer, config: ConfigDict, objective: str = ""
) -> Component:
  """Encodes documents once and cuts them into pieces that fill a row at most; nothing is dropped.

  Args:
    name: for messages.
    texts: the documents.
    tokenizer: the tokenizer.
    config: the resolved config; `data` is read.
    objective: default `config.data.objective`.

  Raises:
    ValueError: the documents have no tokens, or see `form_of_pieces`.
  """
  objective = objective or config.data.objective
  settings, longest = form_of_pieces(objective, config, tokenizer)
  tokens, lengths, key, skipped = tokenised(name, texts, tokenizer, cache_folder(config.data.cache_dir))
  pieces = cut_documents(lengths, longest)
  if not len(pieces):
    raise ValueError(f"the text {name!r} has no tokens: {len(texts)} rows, skipped {dict(skipped)}; give it documents")
  pair = OBJECTIVES[objective].make

  def make(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    begin, end, ends = pieces[index]
    return pair(tokens[begin:end].astype(np.int32), rng, settings, bool(ends))

  def where(index: int) -> str:
    begin, end, _ = pieces[index]
    number = int(np.searchsorted(np.cumsum(lengths), begin, side="right"))
    first = begin - int(np.sum(lengths[:number]))
    document = f"{name}, document {number + 1} of those kept" if skipped else texts.rows.where(number)
    return f"{document}, tokens {first} to {first + end - begin}"

  identity = f"{key} in pieces of {longest}"
  return Component(name, len(pieces), make, identity, where, counts_of(len(texts), skipped))


def cut_documents(lengths: Sequence[int], longest: int, shortest: int = SHORTEST_REST) -> np.ndarray:
  """Cuts documents, laid end to end, into pieces that fill a row, and a rest.

  Args:
    lengths: tokens of each document.
    longest: most tokens in a piece.
    shortest: fewest tokens in the rest of a cut document; the piece before gives it what it lacks.

  Returns:
    int64 [pieces, 3]: begin, end, and 1 where the piece ends its document.

  Example:
    >>> cut_documents([9, 2], 4, shortest=2).tolist()
    [[0, 4, 0], [4, 7, 0], [7, 9, 1], [9, 11, 1]]
  """
  sizes = np.asarray(lengths, np.int64)
  counts = -(-sizes // longest)
  last = np.cumsum(counts) - 1  # each document's last piece
  number = np.arange(counts.sum()) - np.repeat(last - counts + 1, counts)
  begins = np.repeat(np.cumsum(sizes) - sizes, counts) + number * longest
  ends = np.zeros(len(begins), np.int64)
  ends[last[counts > 0]] = 1
  stops = np.where(ends, np.repeat(np.cumsum(sizes), counts), begins + longest)
  lack = np.maximum(min(shortest, longest // 2) - (stops - begins), 0) * (number > 0)
  begins -= lack
  stops[:-1] -= lack[1:]
  return np.stack([begins, stops, ends], axis=1)
