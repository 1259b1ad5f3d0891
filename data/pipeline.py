"""The stream of batches: mixture, packing and order, a pure function of (config, data, seed, position).

The mixture says which source is next, Grain shuffles each source anew each pass, and what is random about an example
(which spans are hidden, which template is used) is drawn from (seed, source, number). The stream's state is how many
were drawn from each source and the few examples held over: it is small, the same on every process, and exact.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.cache import cache_folder
from data.components import Component, corpus_component, held_out_objective, task_component, usual_targets
from data.features import CONVERTERS, NORMALISATIONS, Batch, Example, Layout, capacity, cost
from data.mixture import UNITS, Mixture, Share, mixture_shares
from data.sources import Texts, texts_of
from data.tasks import Domain
from data.tokenizer import Tokenizer

MANY_PASSES = 64  # repeating a source more often than this costs quality (T5 paper, §3.4.2): warn
_COUNTED = {"examples": "examples", "tokens": "supervised_tokens"}  # unit of a mixture -> where the stream counts it
PACKED_TOGETHER = 32  # rows of held-out text that are filled at a time
POOL = 2  # batches' worth of examples to pack the next batch from: enough choice to fill its rows
EVALUATION_SEED = 20_200_601  # of the spans hidden in held-out text, always the same


class Stream:
  """An endless iterator of packed batches with an exact state.

  Args:
    components: the sources.
    shares: one for each component, see `Mixture`.
    layout: the form of a batch.
    batch_size: rows.
    seed: of the order and of everything random in examples.
    packing: several examples in a row.
    unit: what shares count, "examples" or (supervised) "tokens".
    steps: batches over which shares change.
    fingerprint: what else shapes the stream (tokenizer, objective).

  Attributes:
    task_names: component names; an example's `task_id` is its index here.
  """

  def __init__(
    self,
    components: Sequence[Component],
    shares: Sequence[Share],
    layout: Layout,
    batch_size: int,
    seed: int,
    packing: bool = True,
    unit: str = "examples",
    steps: int = 1,
    fingerprint: Mapping[str, Any] | None = None,
  ):
    self.task_names = [component.name for component in components]
    self._components, self._layout, self._batch_size = components, layout, batch_size
    self._seed, self._packing, self._unit = seed, packing, unit
    self._mixture = Mixture([component.size for component in components], shares, seed, steps)
    self._extra = dict(fingerprint or {})
    changing = any(len(share) > 1 for share in shares)
    self._extra |= {"unit": unit, **({"steps": steps} if changing else {})}
    self._shares = dict(zip(self.task_names, shares, strict=True))
    self._batches, self._pending = 0, {}
    self._counts = {name: {"examples": 0, "supervised_tokens": 0} for name in self.task_names}
    self._used = [0] * len(capacity(layout))
    self._usual = [1.0] * len(components)
    if layout.loss_normalisation == "task":
      self._usual = [usual_targets(component) for component in components]
    self._warned: set[str] = set()

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> Batch:
    rows = self._fill_rows()
    for example in (example for row in rows for example in row):
      count = self._counts[self.task_names[example.task_id]]
      count["examples"] += 1
      count["supervised_tokens"] += len(example.targets)
    taken = [cost(example, self._layout.architecture) for row in rows for example in row]
    self._used = [used + sum(side) for used, side in zip(self._used, zip(*taken, strict=True), strict=True)]
    self._warn_of_many_passes()
    return CONVERTERS[self._layout.architecture](rows, self._layout)

  def _fill_rows(self) -> list[list[Example]]:
    """Packs from a pool of examples; those that are left over wait in it for the next batch."""
    packer = Packer(self._layout, self._batch_size, self._packing)
    pool, before = dict(self._pending), self._mixture.state()
    room = sum((packer.size(example) for example in pool.values()), np.zeros(1))
    self._mixture.go_to(self._batches)
    try:
      while room.max() < self._batch_size * (POOL if self._packing else 1):
        key = self._mixture.draw()
        pool[key] = self._example(*key)
        room = room + packer.size(pool[key])
        self._mixture.pay(key[0], 1 if self._unit == "examples" else len(pool[key].targets))
    except BaseException:
      self._mixture.restore(before)  # an error leaves the stream where it was
      raise
    # The oldest first, so that none waits for ever; of the others the largest first, and small ones fill the gaps.
    keys = list(pool)
    oldest, others = keys[: self._batch_size], keys[self._batch_size :]
    others.sort(key=lambda key: -max(packer.size(pool[key])))
    packed = {key for key in [*oldest, *others] if packer.add(pool[key])}
    self._batches += 1
    self._pending = {key: example for key, example in pool.items() if key not in packed}
    return packer.rows

  def _example(self, task_id: int, number: int) -> Example:
    rng = np.random.default_rng((self._seed, task_id, number))
    pair = self._components[task_id].make(self._mixture.item(task_id, number), rng)
    return Example(*pair, task_id, self._usual[task_id])

  def _warn_of_many_passes(self) -> None:
    for component in self._components:
      passes = self._counts[component.name]["examples"] / component.size
      if passes > MANY_PASSES and component.name not in self._warned:
        self._warned.add(component.name)
        advice = "give it a smaller share or fewer steps"
        print(f"warning: source {component.name!r} has been read {MANY_PASSES} times; {advice}")

  def origin(self, state: Mapping[str, Any]) -> list[list[str]]:
    """Says where each example of the batch after `state` came from, row by row; the stream stays where it is."""
    other, made = copy.copy(self), {}
    other._mixture = copy.copy(self._mixture)

    def remember(task_id: int, number: int) -> Example:
      example = self._example(task_id, number)
      made[id(example)] = example, task_id, number
      return example

    other._example = remember
    other.restore(state)
    keys = [[made[id(example)][1:] for example in row] for row in other._fill_rows()]
    return [[self._components[t].where(self._mixture.item(t, number)) for t, number in row] for row in keys]

  def about(self) -> list[str]:
    """Says what each source is: rows read, skipped and truncated, and examples in a pass."""
    lines = [f"{c.name}: {told(c.counts)}; {c.size:,} examples in a pass" for c in self._components]
    if self._layout.loss_normalisation == "task":
      lengths = ", ".join(f"{name} {usual:.1f}" for name, usual in zip(self.task_names, self._usual, strict=True))
      lines.append(f"target tokens of an example, on average, that its loss is divided by: {lengths}")
    return lines + [note for component in self._components for note in component.notes]

  def state(self) -> dict[str, Any]:
    """Returns where the stream stands, as JSON-able values; the batch that follows is determined by it."""
    counts, pending = copy.deepcopy(self._counts), [list(key) for key in self._pending]
    stands = {"batches": self._batches, "mixture": self._mixture.state(), "pending": pending}
    return {**stands, "counts": counts, "used": list(self._used)}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes to a state: the next batch is the one that followed it."""
    self._batches = state["batches"]
    self._mixture.restore(state["mixture"])
    self._pending = {(task_id, number): self._example(task_id, number) for task_id, number in state["pending"]}
    self._counts = copy.deepcopy(dict(state["counts"]))
    self._used = list(state["used"])

  def summary(self, state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Says what a run up to `state` has read.

    Returns:
      For each component its share `asked`, `examples`, `supervised_tokens`, `share` of those, `passes` over the source,
      rows `read`, `skipped` (in all and by reason) and `truncated`; under `"packing"` the share of `decoder` (and
      `encoder`) tokens that are not padding, and as `efficiency` that of the side that fills first.
    """
    tokens = sum(count["supervised_tokens"] for count in state["counts"].values()) or 1
    report: dict[str, dict[str, float]] = {}
    for component, asked in zip(self._components, self._mixture.asked(state["mixture"]), strict=True):
      count = state["counts"][component.name]
      report[component.name] = {
        "asked": float(asked),
        **count,
        "share": count["supervised_tokens"] / tokens,
        "passes": count["examples"] / component.size,
        **component.counts,
      }
    rows = max(state["batches"] * self._batch_size, 1)
    sides = [used / (rows * room) for used, room in zip(state["used"], capacity(self._layout), strict=True)]
    report["packing"] = {"efficiency": max(sides), **dict(zip(("decoder", "encoder"), sides[::-1], strict=False))}
    return report

  def shares(self, state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the shares that a run up to `state` was `asked` for and `achieved`, in what the mixture counts."""
    counts = [state["counts"][name][_COUNTED[self._unit]] for name in self.task_names]
    asked, total = self._mixture.asked(state["mixture"]), sum(counts) or 1
    achieved = [count / total for count in counts]
    return {
      "asked": dict(zip(self.task_names, asked.tolist(), strict=True)),
      "achieved": dict(zip(self.task_names, achieved, strict=True)),
    }

  def fingerprint(self) -> dict[str, Any]:
    """Returns everything that shapes the stream, flat; two streams with equal fingerprints give equal batches."""
    parts = {f"source.{c.name}": f"{c.size} examples, {c.digest}" for c in self._components}
    parts |= {f"share.{name}": [round(s, 12) for s in share] for name, share in self._shares.items()}
    parts |= {f"layout.{key}": value for key, value in self._layout._asdict().items()}
    return {
      **parts,
      **self._extra,
      "order": self.task_names,  # each shuffles by its place
      "batch_size": self._batch_size,
      "pool": POOL,
      "seed": self._seed,
      "packing": self._packing,
    }


class Packer:
  """Fills the rows of one batch, best-fit.

  Args:
    layout: the form of a batch.
    batch_size: rows.
    packing: False puts one example in a row.
  """

  def __init__(self, layout: Layout, batch_size: int, packing: bool = True):
    self.rows: list[list[Example]] = [[] for _ in range(batch_size)]
    self._architecture, self._packing = layout.architecture, packing
    self._capacity = np.array(capacity(layout))
    self._free = np.tile(self._capacity, (batch_size, 1))

  def size(self, example: Example) -> np.ndarray:
    """Returns the share of a row that an example takes, of each kind of row: float64, see `cost`."""
    taken = np.array(cost(example, self._architecture)) / self._capacity
    return taken if self._packing else np.ones_like(taken)

  def add(self, example: Example) -> bool:
    """Puts an example into the row that it fills best; False if it fits none."""
    needs = np.array(cost(example, self._architecture))
    left = self._free - needs
    fits = (left >= 0).all(axis=1)
    if not fits.any():
      return False
    row = int(np.where(fits, (left / self._capacity).sum(axis=1), np.inf).argmin())
    self.rows[row].append(example)
    self._free[row] = left[row] if self._packing else -1
    return True


def layout_of(config: ConfigDict, tokenizer: Tokenizer) -> Layout:
  """Returns the form of this config's batches.

  Raises:
    ValueError: an unknown architecture or normalisation.
  """
  if config.architecture not in CONVERTERS:
    raise ValueError(f"config.architecture is {config.architecture!r}; known: {sorted(CONVERTERS)}")
  if config.data.loss_normalisation not in NORMALISATIONS:
    raise ValueError(f"data.loss_normalisation is {config.data.loss_normalisation!r}; known: {list(NORMALISATIONS)}")
  return Layout(
    config.architecture,
    config.data.encoder_length,
    config.data.decoder_length,
    tokenizer.start_id,
    tokenizer.eos_id,
    config.data.loss_normalisation,
    config.data.bidirectional_prefix,
  )


def build_stream(
  config: ConfigDict,
  tokenizer: Tokenizer,
  domain: Domain,
  general: Texts | None,
  sources: Mapping[str, Texts],
) -> Stream:
  """Builds the training stream of `config.data`.

  Args:
    config: the resolved config.
    tokenizer: the tokenizer.
    domain: corpus and tasks.
    general: training documents of the general text, or None.
    sources: name -> training documents of `config.sources`.

  Raises:
    ValueError: an unknown name or a bad share in the mixture, or an example that is too long (`data.overlong`).
  """
  corpora = {"domain": domain.corpus, **({"general": general} if general else {}), **sources}
  shares = mixture_shares(config, domain.tasks, corpora)
  layout = layout_of(config, tokenizer)
  cache = cache_folder(config.data.cache_dir)
  components = [
    task_component(domain.tasks[name], tokenizer, layout, config.data.overlong, cache)
    if name in domain.tasks
    else corpus_component(name, corpora[name], tokenizer, config)
    for name in shares
  ]
  fingerprint = {"tokenizer": tokenizer.fingerprint(), "objective": config.data.objective}
  fingerprint |= {key: config.data[key] for key in ("noise_density", "mean_span_length")}
  data = config.data
  if data.mixture_unit not in UNITS:
    raise ValueError(f"config.data.mixture_unit is {data.mixture_unit!r}; known: {UNITS}")
  if (data.mixture_unit, data.loss_normalisation) == ("tokens", "task"):
    raise ValueError(
      "config.data.loss_normalisation is 'task', which gives each source its share of the loss where shares count "
      "examples, but config.data.mixture_unit is 'tokens', which does so with 'token'; change one of the two"
    )
  if config.seed < 0:
    raise ValueError(f"config.seed must be 0 or more, got {config.seed}")
  settings = (layout, data.batch_size, config.seed, data.packing, data.mixture_unit, config.train.steps)
  return Stream(components, list(shares.values()), *settings, fingerprint)


def told(counts: Mapping[str, int]) -> str:
  """Returns counts in words.

  Example:
    >>> told({"read": 1200, "skipped": 2, "skipped: not UTF-8": 2})
    '1,200 rows read, 2 skipped (not UTF-8: 2)'
  """
  reasons = ", ".join(f"{reason}: {n:,}" for reason, n in _reasons(counts).items())
  parts = [f"{counts['read']:,} rows read"]
  parts += [f"{counts[key]:,} {key}" for key in ("skipped", "truncated") if counts.get(key)]
  return ", ".join(parts) + (f" ({reasons})" if reasons else "")


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
  """Returns the skipped rows of `counts_of`, by reason."""
  mark = "skipped: "
  return {key.removeprefix(mark): count for key, count in counts.items() if key.startswith(mark)}


class HeldOut(NamedTuple):
  """What perplexity is measured on.

  Attributes:
    batches: the last one is filled up with empty rows.
    count_bytes: UTF-8 bytes that the targets stand for.
    skipped: reason -> documents that were passed over (`data.bad_rows`).
  """

  batches: list[Batch]
  count_bytes: int
  skipped: dict[str, int]


def held_out_batches(texts: Texts, tokenizer: Tokenizer, config: ConfigDict, rows: int = 0) -> HeldOut:
  """Makes the batches that perplexity is measured on: each piece once, the same spans hidden every time.

  Args:
    texts: held-out documents; those after `evaluate.corpus_tokens` tokens are left out.
    tokenizer: the tokenizer.
    config: the resolved config; the objective that `held_out_objective` finds, and `data`'s lengths.
    rows: of a batch; 0 = `config.evaluate.batch_size`.

  Returns:
    What is measured. What lies in a row does not depend on `rows`, so that a model that is measured in other batches is
    compared row by row all the same.
  """
  limit, total, chosen, skipped = config.evaluate.corpus_tokens, 0, [], {}
  for text in texts.read(skipped) if limit else ():
    chosen.append(text)
    total += len(tokenizer.encode(text))
    if total >= limit:
      break
  texts = texts_of(chosen) if limit else texts
  component = corpus_component("held out", texts, tokenizer, config, held_out_objective(config))
  skipped |= _reasons(component.counts)
  layout, size = layout_of(config, tokenizer)._replace(loss_normalisation="token"), 0
  examples = []
  for index in range(component.size):
    example = Example(*component.make(index, np.random.default_rng((EVALUATION_SEED, index))))
    size += tokenizer.count_bytes(example.targets.tolist())
    examples.append(example)
  packed = [row for some in pack_all(examples, layout, PACKED_TOGETHER) for row in some if row]
  rows = rows or config.evaluate.batch_size
  packed += [[] for _ in range(-len(packed) % rows)]
  batches = [CONVERTERS[layout.architecture](packed[at : at + rows], layout) for at in range(0, len(packed), rows)]
  return HeldOut(batches, size, skipped)


def pack_all(examples: Iterable[Example], layout: Layout, batch_size: int) -> Iterator[list[list[Example]]]:
  """Packs every example once, in order, into the rows of one batch after the other; the last may have empty rows.

  Raises:
    ValueError: an example is longer than a row.
  """
  packer = Packer(layout, batch_size)
  for example in examples:
    if not packer.add(example):
      yield packer.rows
      packer = Packer(layout, batch_size)
      if not packer.add(example):
        raise ValueError(f"an example of {cost(example, layout.architecture)} tokens does not fit {capacity(layout)}")
  if any(packer.rows):
    yield packer.rows
