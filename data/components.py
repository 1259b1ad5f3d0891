"""Components of the mixture: a task's rows, or an unlabelled text, as numbered examples."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.cache import cache_folder, tokenised
from data.features import Layout, capacity
from data.objectives import MODES, OBJECTIVES, ObjectiveSettings, raw_length
from data.sources import read_rows
from data.tasks import Task, encode_prompt, encode_target, nested_labels, read_task_rows, render
from data.tokenizer import Tokenizer

SHORTEST_REST = 16  # tokens: less would teach nothing


class Component(NamedTuple):
  """One source of the mixture.

  Attributes:
    name: in the mixture.
    size: examples in a pass.
    make: `(index below size, rng) -> (inputs, targets)`.
    digest: a hash of the content.
    left_out: examples skipped or truncated for their length, by what was done.
  """

  name: str
  size: int
  make: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
  digest: str
  left_out: Mapping[str, int]


def task_component(task: Task, tokenizer: Tokenizer, layout: Layout, overlong: str) -> Component:
  """Encodes a task's training rows, once for each template; the template of an example is drawn.

  Raises:
    ValueError: an example is longer than a row and `overlong` is "error" (or not a known choice).
  """
  if overlong not in ("error", "skip", "truncate"):
    raise ValueError(f"config.data.overlong is {overlong!r}; known: ['error', 'skip', 'truncate']")
  rows = read_task_rows(task, "train")
  count, encoded = {"skipped": 0, "truncated": 0}, []
  for number, row in enumerate(rows):
    versions = [_encode(tokenizer, *render(task, row, t)) for t in range(len(task.templates))]
    fitting = [fit(inputs, targets, layout) for inputs, targets in versions]
    lost = any(pair is None for pair in fitting)
    if lost or any(len(pair[0]) < len(whole[0]) for pair, whole in zip(fitting, versions, strict=True)):
      if overlong == "error":
        raise ValueError(_too_long(task, number, versions, layout))
      if overlong == "skip" or lost:
        count["skipped"] += 1
        continue
      count["truncated"] += 1
    encoded.append(fitting)
  if not encoded:
    raise ValueError(f"task {task.name!r}: every training row is longer than a row of {capacity(layout)} tokens")
  if any(count.values()):
    print(f"task {task.name}: {count['truncated']} of {len(rows)} rows truncated, {count['skipped']} skipped")
  for shorter, longer in nested_labels(task, tokenizer):
    print(f"task {task.name}: in tokens, label {shorter!r} begins label {longer!r}; EOS tells them apart")

  def make(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    versions = encoded[index]
    return versions[rng.integers(len(versions))] if len(versions) > 1 else versions[0]

  pieces = (array for versions in encoded for version in versions for array in version)
  return Component(task.name, len(encoded), make, digest(pieces), {key: n for key, n in count.items() if n})


def _too_long(task: Task, number: int, versions: Sequence[tuple[np.ndarray, np.ndarray]], layout: Layout) -> str:
  line, _ = next(itertools.islice(read_rows(task.files["train"]), number, None))
  lengths = " or ".join(f"{len(inputs)} + {len(targets)}" for inputs, targets in versions)
  return (
    f"{task.files['train']}:{line}: the example has {lengths} tokens, a row holds {capacity(layout)}; raise "
    "data.encoder_length / data.decoder_length, or set data.overlong to 'truncate' (inputs lose their end) or 'skip'"
  )


def _encode(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
  return np.array(encode_prompt(tokenizer, prompt), np.int32), np.array(encode_target(tokenizer, answer), np.int32)


def fit(inputs: np.ndarray, targets: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
  """Shortens inputs, keeping their EOS, until the pair fits a row; None where the targets alone do not.

  Example:
    >>> layout = Layout("gpt", 0, 6, start_id=0, eos_id=1)
    >>> [x.tolist() for x in fit(np.array([5, 6, 7, 8, 1]), np.array([9, 1]), layout)]
    [[5, 6, 7, 1], [9, 1]]
  """
  room = layout.encoder_length if layout.architecture == "t5" else layout.decoder_length - len(targets)
  if len(targets) > layout.decoder_length or room < 2:
    return None
  return (inputs, targets) if len(inputs) <= room else (np.concatenate([inputs[: room - 1], inputs[-1:]]), targets)


def corpus_component(name: str, texts: Sequence[str], tokenizer: Tokenizer, config: ConfigDict) -> Component:
  """Encodes documents once and cuts them into pieces that fill a row at most; nothing is dropped."""
  data = config.data
  if not (0 < data.noise_density < 1 and data.mean_span_length >= 1):
    got = f"{data.noise_density} and {data.mean_span_length}"
    raise ValueError(f"data.noise_density must be between 0 and 1, data.mean_span_length at least 1; got {got}")
  modes = tuple(tuple(tokenizer.encode(mode)) for mode in MODES)
  settings = ObjectiveSettings(
    tokenizer.eos_id, tokenizer.sentinel_ids, data.noise_density, data.mean_span_length, modes
  )
  longest = raw_length(data.objective, config.architecture, data.encoder_length, data.decoder_length, settings)
  tokens, lengths, key = tokenised(name, texts, tokenizer, cache_folder(data.cache_dir))
  pieces = cut_documents(lengths, longest)
  objective = OBJECTIVES[data.objective].make

  def make(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    begin, end, ends = pieces[index]
    return objective(tokens[begin:end], rng, settings, bool(ends))

  return Component(name, len(pieces), make, digest([np.frombuffer(key.encode(), np.uint8), pieces]), {})


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


def digest(arrays: Iterable[np.ndarray]) -> str:
  """Returns a hash of arrays' contents."""
  state = hashlib.sha256()
  for array in arrays:
    state.update(np.ascontiguousarray(array).tobytes())
  return state.hexdigest()[:16]
