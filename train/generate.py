"""Texts from a model as they are asked for: drawn, by beams, held to labels, until a stop string, piece by piece."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data.prompts import Frame, around, unframed
from data.tasks import Task
from models import Model, decode
from models.decode import GREEDY, Choice, Trie
from models.model import Prompts
from models.module import Params
from models.sharding import batch_parts, fetch, on_mesh, whole_batch
from train.evaluator import Evaluator, searcher
from train.text_metrics import GENERATION

LOOK_EVERY = 8  # tokens between two looks for stop strings
# Many draws end at very different lengths. So often the rows that are done are counted, and where half are, left out;
# no batch gets smaller than the second number, for each size is compiled.
SHRINK_EVERY, SMALLEST = 32, 16


class Wish(NamedTuple):
  """How texts are to be written.

  Attributes:
    choice: of each token, where there is one beam.
    beams: more than 1: beam search. length_penalty: see `models.beam.search`.
    samples: texts for each prompt: draws, or the best beams.
    stops: strings that end a text, and are left out of it.
    seed: of the draws.
    room: most tokens; 0 = `config.evaluate.max_new_tokens`.
    held: to the labels of a classification task.
    template: which of the task's templates the prompts are of.
    consensus: a metric of generated text: of the samples only the one that the others bear out most is kept, see
      `consensus`; "" = all are.
  """

  choice: Choice = GREEDY
  beams: int = 1
  length_penalty: float = 1.0
  samples: int = 1
  stops: tuple[str, ...] = ()
  seed: int = 0
  room: int = 0
  held: bool = False
  template: int = 0
  consensus: str = ""


def wish_of(settings: ConfigDict, metric: str) -> Wish:
  """Returns how a task's answers are to be written.

  Args:
    settings: `config.evaluate`.
    metric: the task's headline, which its candidates are compared by.

  Raises:
    ValueError: settings that do not go together.
  """
  drawn = settings.candidates > 1
  if settings.candidates < 1 or not (drawn or settings.temperature == 1.0):
    raise ValueError(
      "candidates must be 1 or more, and temperature is of their draws: set more than one, got "
      f"{settings.candidates} and temperature {settings.temperature}"
    )
  choice = Choice(settings.temperature if drawn else 0.0, repetition_penalty=settings.repetition_penalty)
  consensus = {"samples": settings.candidates, "consensus": metric} if drawn else {}
  wish = Wish(choice, settings.beams, settings.length_penalty, **consensus)
  check(wish)
  return wish


def check(wish: Wish, task: Task | None = None) -> None:
  """Raises a ValueError where settings do not go together."""
  decode.check_choice(wish.choice)
  if wish.beams < 1:
    raise ValueError(f"beams must be 1 (greedy) or more, got {wish.beams}")
  if wish.beams == 1 and wish.length_penalty != 1.0:
    raise ValueError(f"length_penalty is of beams: set more than one, got length_penalty {wish.length_penalty}")
  if wish.samples < 1 or wish.room < 0:
    raise ValueError(f"num_samples must be 1 or more, and max_new_tokens not negative, got {wish.samples}, {wish.room}")
  if wish.beams > 1 and (wish.choice != GREEDY or wish.held):
    raise ValueError("beams go without temperature, top_k, top_p, repetition_penalty and labels")
  if wish.samples > 1 and wish.choice.temperature == 0 and wish.samples > wish.beams:
    raise ValueError(f"{wish.samples} samples need a temperature, or as many beams; got {wish.beams} beams")
  judges = [name for name, metric in GENERATION.items() if metric.better]
  if wish.consensus and (wish.consensus not in judges or wish.samples == 1):
    raise ValueError(f"consensus is of several samples, by one of {judges}, got {wish.consensus!r} of {wish.samples}")
  if "" in wish.stops:
    raise ValueError("a stop string is empty")
  if wish.held and (task is None or task.kind != "classification"):
    raise ValueError(f"only a classification task has labels to hold to, got {task.name if task else 'no task'!r}")


def answers(
  evaluator: Evaluator,
  texts: Sequence[str],
  wish: Wish,
  task: Task | None = None,
  rows: Sequence[Mapping[str, Any]] = (),
) -> list[list[str]]:
  """Answers prompts.

  Args:
    evaluator: the model.
    texts: prompts.
    wish: how.
    task: the task that they are prompts of, or None.
    rows: the task's rows that they are prompts of: what its template puts around an answer is then left out.

  Returns:
    `wish.samples` answers to each prompt, or with `wish.consensus` one of them.

  Raises:
    ValueError: settings that do not go together.
  """
  check(wish, task)
  frame, drafts = evaluator.frame(task), _drafts(evaluator, texts, wish, task)

  def read(place: int, tokens: np.ndarray) -> str:
    text = cut(_text(evaluator, frame, tokens), wish.stops)
    if frame.after:  # else a text goes on, and where it begins with a space another word does
      text = text.strip()
    return unframed(task, rows[place], wish.template, text) if rows else text

  found = [[read(place, tokens) for tokens in several] for place, several in enumerate(drafts)]
  if not wish.consensus:
    return found
  if wish.beams > 1 or not evaluator.counts_examples:
    return [[consensus(several, wish.consensus)] for several in found]
  # As such a loss makes a text likely, it is drawn 1/n times as often as it is right: the weights make up for it.
  ends = (evaluator.tokenizer.eos_id, evaluator.tokenizer.pad_id)
  sizes = [[_length(tokens, ends) for tokens in several] for several in drafts]
  return [[consensus(several, wish.consensus, weights)] for several, weights in zip(found, sizes, strict=True)]


def _drafts(evaluator: Evaluator, texts: Sequence[str], wish: Wish, task: Task | None) -> list[list[np.ndarray]]:
  """Returns the tokens of `wish.samples` answers to each prompt, int [tokens] each; see `answers`."""
  frame, room = evaluator.frame(task), _room(evaluator, wish, task)
  drafts: list[list[np.ndarray]] = [[] for _ in texts]
  drawn = wish.samples if wish.beams == 1 else 1
  size, together = _shape(whole_batch(evaluator.config.evaluate.batch_size), drawn)
  for number, (places, prompts) in enumerate(evaluator.batches(texts, frame, room, task, size)):
    key = jax.random.fold_in(jax.random.key(wish.seed), number)
    for turn in range(-(-drawn // together)):
      if wish.beams > 1:
        written = fetch(_searcher(evaluator, wish, room)(evaluator.params, prompts))
      else:
        pieces = _pieces(evaluator, prompts, wish, task, frame, jax.random.fold_in(key, turn), len(places), together)
        *_, last = pieces
        written = last.reshape(size, together, -1)
      for place, several in zip(places, written, strict=False):
        drafts[place].extend(several[: wish.samples - len(drafts[place])])
  return drafts


def _length(tokens: np.ndarray, ends: tuple[int, int]) -> int:
  """Counts a draw's tokens, with the EOS that ends it; one that a stop string ended is filled up from there.

  Example:
    >>> [_length(np.array(tokens), (1, 0)) for tokens in ([5, 6, 1, 0], [5, 6, 0, 0], [5, 6, 7, 8])]
    [3, 2, 4]
  """
  over = np.flatnonzero(np.isin(tokens, ends))
  return len(tokens) if not len(over) else int(over[0] + (tokens[over[0]] == ends[0]))


def _shape(size: int, drawn: int) -> tuple[int, int]:
  """Returns how many prompts make a batch of at most `size` rows, and how many draws of each are made together.

  Prompts are a multiple of the parts that rows lie in, as `size` is.
  """
  parts = batch_parts()
  prompts = max(size // drawn // parts, 1) * parts
  return prompts, min(size // prompts, drawn)


def consensus(texts: Sequence[str], metric: str, weights: Sequence[float] | None = None) -> str:
  """Returns the text that scores best on average where each of the others is taken for the right one.

  Where the texts are draws from a model, it is the one that the model expects to score best (minimum Bayes risk).

  Args:
    texts: draws or beams; of equals that which was drawn most, or else the first.
    metric: a name in `train.text_metrics.GENERATION`, of which a text's own value is taken.
    weights: of the texts in the average, above 0; None: all weigh the same.

  Reference:
    Eikema and Aziz, "Is MAP decoding all you need?" (2020), section 6, with the candidates as their own references.

  Example:
    >>> consensus(["a dry cough", "a fever", "a cough"], "rouge1")
    'a cough'
  """
  counts, sums, measure = Counter(texts), Counter(), GENERATION[metric]
  for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
    sums[text] += weight
  outputs, references = ([pair[side] for pair in itertools.product(counts, repeat=2)] for side in (0, 1))
  parts = measure.parts(outputs, references, [""] * len(outputs))
  values = measure.better * measure.value(parts).reshape(len(counts), len(counts))
  whole = np.array([sums[text] for text in counts])
  one = whole / np.array(list(counts.values()))  # a text is not compared with itself
  expected = (values @ whole - np.diag(values) * one) / np.maximum(whole.sum() - one, 1e-9)
  # Where a metric sees nothing in short texts (BLEU below four words), what was drawn most often is borne out most.
  best = np.flatnonzero(expected >= expected.max() - 1e-12)
  return list(counts)[int(best[whole[best].argmax()])]


def stream(
  evaluator: Evaluator, text: str, wish: Wish, task: Task | None = None, row: Mapping[str, Any] | None = None
) -> Iterator[str]:
  """Yields an answer's pieces as they are written; joined they are the answer, spaces around it aside.

  Args:
    evaluator, text, wish, task, row: see `answers`.

  Raises:
    ValueError: settings that do not go together, or more than one text is asked for.
  """
  check(wish, task)
  if wish.beams > 1 or wish.samples > 1:
    raise ValueError(f"a stream is of one text, got {wish.beams} beams and {wish.samples} samples")
  frame, shown = evaluator.frame(task), ""
  before, after = around(task, row, wish.template) if row else ("", "")
  stops = (*wish.stops, *([f"{after}\0"] if after else []))  # an answer's end is known by nothing that follows
  [(_, prompts)] = evaluator.batches([text], frame, _room(evaluator, wish, task))
  whole = ""
  for written in _pieces(evaluator, prompts, wish, task, frame, jax.random.key(wish.seed), 1, every=1):
    whole = cut(_text(evaluator, frame, written[0]), wish.stops)
    sure = _text(evaluator, frame, written[0, : frame.settled(written[0].tolist())])
    sayable = whole.rstrip() if after else whole  # the end may come before the last spaces
    ready = sayable[: min(len(sure), len(sayable)) - withheld(sayable, stops)]
    if before:
      begun = ready.lstrip()
      ready = "" if before.startswith(begun) else begun.removeprefix(before).lstrip()
    if len(ready) > len(shown):
      yield ready[len(shown) :]
      shown = ready
  if before or after:
    whole, shown = unframed(task, row, wish.template, whole), shown.lstrip()
  if len(whole) > len(shown):
    yield whole[len(shown) :]


def cut(text: str, stops: Sequence[str]) -> str:
  """Returns what stands before the first stop string: that which ends first, as it is seen first while text is written.

  Example:
    >>> cut("one. two. three", (" three", ". ")), cut("xEND.", ("END.", "D"))
    ('one', 'xEN')
  """
  found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
  return text[: min(found)[1] if found else len(text)]


def withheld(text: str, stops: Sequence[str]) -> int:
  """Counts the last characters that more tokens may change: half a character, or the beginning of a stop string.

  Example:
    >>> withheld("wait EN", ("END",)), withheld("wait", ("END",)), withheld("wait x\ufffd", ("xé",))
    (2, 0, 2)
  """
  whole = text.rstrip("\ufffd")
  begun = (size for stop in stops for size in range(1, len(stop)) if whole.endswith(stop[:size]))
  return len(text) - len(whole) + max(begun, default=0)


def _pieces(
  evaluator: Evaluator,
  prompts,
  wish: Wish,
  task: Task | None,
  frame: Frame,
  key: jax.Array,
  real: int,
  copies: int = 1,
  every: int = 0,
) -> Iterator[np.ndarray]:
  """Yields what is written, int [prompts · copies, tokens], at each look; the first `real` prompts count."""
  model, params, tokenizer = evaluator.model, evaluator.params, evaluator.tokenizer
  room, labels = _room(evaluator, wish, task), ()
  if wish.held:  # a chat's answers may end with another token than the one that ends a row
    found = evaluator.label_tokens(task, wish.template)
    labels = tuple((*label, *[tokenizer.eos_id] * (label[-1] != tokenizer.eos_id)) for label in found)
  settings = (room, tokenizer.eos_id, tokenizer.pad_id, wish.choice, labels, copies)
  begin, advance, loose, shrink = _programs(model, *settings)
  carry, params = begin(params, prompts), loose(params)
  here = np.arange(carry["done"].shape[0])  # which rows the carry holds
  written, done = np.full((len(here), room), tokenizer.pad_id, np.int32), here >= real * copies
  every = every or (LOOK_EVERY if wish.stops else SHRINK_EVERY if copies > 1 else room)
  for end in range(every, room + every, every):
    carry = advance(params, carry | on_mesh({"done": done}), key, jnp.int32(min(end, room)))
    written[here], done = fetch(carry["written"]), fetch(carry["done"])
    yield written[:, :end]
    if wish.stops:
      text = functools.partial(_text, evaluator, frame)
      done = done | [any(stop in text(written[row, :end]) for stop in wish.stops) for row in here]
    if done.all():
      return
    while copies > 1 and (kept := _unfinished(done)) is not None:
      own, everywhere = kept
      carry, here, done = shrink(carry, on_mesh({"rows": own})["rows"]), here[everywhere], done[everywhere]


def _unfinished(done: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns half of the rows, with all that are not done: numbered in each device's part, and in all; None: too many.

  Example:
    >>> _unfinished(np.arange(32) % 4 > 0)[1].tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 1, 2, 3, 5, 6, 7, 9, 10]
  """
  parts = batch_parts()
  done_PR = done.reshape(parts, -1)
  half = done_PR.shape[1] // 2
  if len(done) < 2 * SMALLEST or half < 1 or (~done_PR).sum(axis=1).max() > half:
    return None
  own_PR = np.argsort(done_PR, axis=1, kind="stable")[:, :half]
  everywhere_PR = own_PR + done_PR.shape[1] * np.arange(parts)[:, None]
  return own_PR.reshape(-1).astype(np.int32), everywhere_PR.reshape(-1)


def _room(evaluator: Evaluator, wish: Wish, task: Task | None) -> int:
  room = wish.room or evaluator.config.evaluate.max_new_tokens
  return max(room, evaluator.label_room(task, wish.template)) if wish.held else room  # a piece of a label is none


def _text(evaluator: Evaluator, frame: Frame, tokens: np.ndarray) -> str:
  return evaluator.tokenizer.decode(frame.answered(tokens.tolist()))


def _searcher(evaluator: Evaluator, wish: Wish, room: int) -> Callable:
  ends = {"eos_id": evaluator.tokenizer.eos_id, "pad_id": evaluator.tokenizer.pad_id}
  return searcher(evaluator.model, beams=wish.beams, room=room, length_penalty=wish.length_penalty, **ends)


@functools.cache
def _programs(
  model: Model, room: int, eos_id: int, pad_id: int, choice: Choice, labels: tuple, copies: int
) -> tuple[Callable, ...]:
  """The compiled `begin`, `advance`, `loose_params` and `pick` of a model."""
  trie: Trie | None = decode.make_trie(labels, model.config.padded_vocab_size) if labels else None

  def begin(params: Params, prompts: Prompts) -> decode.Carry:
    return decode.spread(decode.begin(model, params, prompts, room=room, pad_id=pad_id, choice=choice), copies)

  ends = {"eos_id": eos_id, "pad_id": pad_id}
  advance = functools.partial(decode.advance, model, choice=choice, trie=trie, **ends)
  return jax.jit(begin), jax.jit(advance, donate_argnums=1), jax.jit(decode.loose_params), jax.jit(decode.pick)
