"""`argot doctor`: looks at data, tokenizer, stream and model before a long run, and reports all that it finds."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data.cache import cache_folder
from data.components import form_of_pieces, held_out_objective
from data.features import Batch
from data.inspect import Finding, bad_rows, inspect_tasks, inspect_texts, read_folder
from data.pipeline import MANY_PASSES, Stream, layout_of
from data.prompts import check_tasks
from data.sources import Texts, open_texts
from data.tokenizer import Tokenizer
from models import Model
from models.sharding import make_mesh, on_mesh
from train import loop, programs
from train.arms import MAIN_LINE, overruled, plan_stages
from train.evaluate import check_evaluation
from train.recipe import NO_GENERAL, domain_folder, find_tokenizer, open_general, open_stage, open_stream, read_gate
from train.skills import build_skills
from train.stage import Materials, inherit, scratch_params

DRAWN = 50  # batches of a stage that are looked at
LITTLE_PACKED = 0.8  # share of a batch that is not padding
FAR_OFF = 0.02  # between an asked and an achieved share
LITTLE_LOSS = 0.01  # share of the loss that a task may lose itself in
SHOWN_TOKENS = 60  # of a rendered example
PROBED_PARAMETERS = 500_000_000  # a larger model is probed, and not timed, with one layer
FAULTS = (ValueError, OSError, KeyError, TypeError, RuntimeError)

Section = tuple[str, list[Finding]]


def examine(config: ConfigDict, workdir: Path, steps: int, given: Collection[str] = ()) -> Iterator[Section]:
  """Examines a config and everything that it names; goes on after a fault.

  Args:
    config: the recipe's config.
    workdir: for what a run would make (the sample domain, a trained tokenizer).
    steps: training steps that are timed; 0 = none.
    given: keys of the config that the command line set.

  Yields:
    Title and findings of each section, when it is done.
  """
  findings: list[Finding] = []
  config = _try(findings, "config.init_from", lambda: inherit(config.copy_and_resolve_references()))
  if config is None:
    yield "Weights", findings
    return
  reached = _try(findings, "config.stages", lambda: overruled(config, given)) or []
  findings += [Finding("warning", "config.stages", line) for line in reached]
  domain = read_folder(config, domain_folder(config, workdir), findings)
  _try(findings, "config.evaluate", lambda: check_evaluation(config.evaluate, domain.tasks))
  sources, general = _texts(config, findings)
  tokenizer = _try(findings, "config.tokenizer", lambda: find_tokenizer(config, workdir, domain, general[0]))
  layout = _try(findings, "config", lambda: layout_of(config, tokenizer)) if tokenizer else None
  if layout:
    _try(findings, "config.evaluate", lambda: form_of_pieces(held_out_objective(config), config, tokenizer))
  yield "Folder, rows, sources", findings
  if layout is None:
    return
  more = {**({"general": general[0]} if general[0] else {}), **sources}
  yield "Text", list(inspect_texts(domain, more, tokenizer))
  said = config.data.overlong, config.evaluate.max_new_tokens
  yield "Tasks", _all("config.tasks", inspect_tasks(domain, tokenizer, layout, *said))
  with config.unlocked():
    config.data.bad_rows = "skip"  # said already
    config.data.overlong = "truncate" if config.data.overlong == "error" else config.data.overlong
  materials = Materials(tokenizer, domain, *general, sources)
  yield from _stages(config, workdir, materials, steps)


def _stages(config: ConfigDict, workdir: Path, materials: Materials, steps: int) -> Iterator[Section]:
  findings: list[Finding] = []
  stages = _try(findings, "config.stages", lambda: plan_stages(config, materials.domain)) or []
  skills = _try(findings, "what is measured", lambda: build_skills(config, materials))
  if skills:
    old = {name: task for name, task in skills.tasks.items() if name in skills.retained}
    _try(findings, "config.retain", lambda: check_tasks(old, materials.tokenizer))
  if stages and skills:
    _try(findings, "config.gate", lambda: read_gate(config, stages, skills))
  configs, batches, names = {}, {}, {}
  ways = {stage.name: partial(open_stage, config, workdir, stage, materials) for stage in stages}
  order = list(MAIN_LINE)
  if not config.stages:  # of `argot train`: the config is its one stage's
    ways, order = {"train": lambda: (config, open_stream(config, materials))}, ["train"]
  for name, build in ways.items():
    built = _try(findings, f"stage {name}", build)
    if built:
      wrong: list[Finding] = []
      _try(wrong, f"stage {name}", partial(loop.check_config, built[0], materials.tokenizer))
      findings += [finding for finding in wrong if all(finding.what != said.what for said in findings)]
    if built and built[0].train.steps:  # an average trains on nothing, nor does a base that is given
      configs[name], names[name] = built[0], built[1].task_names
      if said := loop.still_warming_up(built[0]):
        findings.append(Finding("warning", f"stage {name}", said, "make optimizer.warmup_steps a part of the stage"))
      batches[name], found = look_at_stream(f"stage {name}", *built)
      findings += found
  yield "Mixtures and packing", findings
  shown = [
    finding._replace(where=f"{name}, {finding.where}")
    for name in order
    if name in batches
    for finding in rendered(batches[name], names[name], materials.tokenizer)
  ]
  yield "Examples: what is read, and [what is learned]", shown
  last = next((name for name in reversed(order) if name in batches), None)
  if last:
    yield "Model", _all("config.model", look_at_model(configs, batches[last], last, materials.tokenizer, steps))


def _texts(config: ConfigDict, findings: list[Finding]) -> tuple[dict[str, Texts], tuple[Texts | None, Texts | None]]:
  """Opens `config.sources` and `config.general`."""
  cache, sources = cache_folder(config.data.cache_dir), {}
  severity = "error" if config.data.bad_rows == "error" else "warning"
  for name, source in config.sources.to_dict().items():
    opened = _try(findings, f"config.sources.{name}", lambda source=source: open_texts(source, cache, "skip"))
    sources |= {name: opened} if opened else {}
  general = _try(findings, "config.general", lambda: open_general(config.general, cache, "skip", sources))
  general = general or (None, None)
  if not config.general:
    findings.append(Finding("info", "config.general", NO_GENERAL))
  for texts in (*sources.values(), *(part for part in general if part)):
    findings.extend(bad_rows(texts.rows, texts.document, severity))
  return sources, general


def _try(findings: list[Finding], where: str, run) -> Any:
  """Returns `run()`, or None and a finding."""
  try:
    return run()
  except FAULTS as error:
    findings.append(Finding("error", where, str(error), "see configs/base.py"))
    return None


def _all(where: str, checks: Iterator[Finding]) -> list[Finding]:
  """Collects findings; a check that fails is one more."""
  findings: list[Finding] = []
  _try(findings, where, lambda: findings.extend(iter(checks)))
  return findings


def look_at_stream(where: str, config: ConfigDict, stream: Stream) -> tuple[Batch, list[Finding]]:
  """Draws the first batches of a stage: shares, passes, packing, tokens.

  Returns:
    The first batch and the findings.
  """
  count = min(config.train.steps, DRAWN)
  first = next(stream)
  supervised, filled = int((first["decoder_loss_weights"] > 0).sum()), real(first)
  for _ in range(count - 1):
    batch = next(stream)
    supervised, filled = supervised + int((batch["decoder_loss_weights"] > 0).sum()), filled + real(batch)
  state = stream.state()
  summary, shares = stream.summary(state), stream.shares(state)
  times = config.train.steps / count
  findings = []
  told = []
  for name in stream.task_names:
    found, asked, achieved = summary[name], shares["asked"][name], shares["achieved"][name]
    passes = found["passes"] * times
    told.append(
      f"{name}: {asked:.1%} asked, {achieved:.1%} drawn, {found['share']:.1%} of targets, {passes:.1f} passes"
    )
    if passes > MANY_PASSES:
      what = f"{name} would be read {passes:.0f} times; more than {MANY_PASSES} passes cost quality"
      findings.append(Finding("warning", where, what, "give it a smaller share, fewer steps, or more data"))
    if abs(asked - achieved) > FAR_OFF and count == DRAWN:
      what = f"{name} gets {achieved:.1%} where {asked:.1%} were asked for"
      findings.append(Finding("warning", where, what, "draw larger batches"))
    if config.data.loss_normalisation == "token" and asked and found["share"] < LITTLE_LOSS:
      what = f"{name} is {found['share']:.2%} of the loss: its answers are short beside the others"
      findings.append(Finding("warning", where, what, "set data.loss_normalisation or data.mixture_unit"))
  packed = summary["packing"]["efficiency"]
  if packed < LITTLE_PACKED and config.data.packing:
    what = f"rows are filled to {packed:.0%}"
    findings.append(Finding("warning", where, what, "take longer rows, so that more examples share one"))
  what = (
    f"{config.train.steps:,} steps, {filled / count:,.0f} tokens a step, {supervised / count:,.0f} of them targets, "
  )
  what += f"{filled * times:,.0f} in all; rows filled {packed:.0%}; {'; '.join(told)}"
  return first, [*findings, Finding("info", where, what)]


def real(batch: Batch) -> int:
  """Returns the tokens of a batch that are not padding."""
  return sum(int((batch[key] > 0).sum()) for key in batch if key.endswith("segment_ids"))


def rendered(batch: Batch, names: Sequence[str], tokenizer: Tokenizer) -> list[Finding]:
  """Shows the first example of each source token by token, as the model gets it; targets stand in brackets."""
  findings = []
  for task_id, name in enumerate(names):
    rows, columns = np.nonzero(batch["task_ids"] == task_id)
    if not len(rows):
      continue
    row, segment = rows[0], batch["decoder_segment_ids"][rows[0], columns[0]]
    here = batch["decoder_segment_ids"][row] == segment
    parts = []
    if "encoder_input_tokens" in batch:
      there = batch["encoder_segment_ids"][row] == segment
      parts.append(_shown(batch["encoder_input_tokens"][row][there], None, tokenizer))
    weights = batch["decoder_loss_weights"][row][here]
    parts.append(_shown(batch["decoder_target_tokens"][row][here], weights, tokenizer))
    findings.append(Finding("info", name, "  ⟶  ".join(parts)))
  return findings


def _shown(tokens: np.ndarray, weights: np.ndarray | None, tokenizer: Tokenizer) -> str:
  words = []
  for i, token in enumerate(tokens[:SHOWN_TOKENS].tolist()):
    word = "⏎" if token == tokenizer.eos_id else tokenizer.decode([token]).replace("\n", "\\n")
    words.append(f"[{word}]" if weights is not None and weights[i] > 0 else word)
  return "|".join(words) + ("|…" if len(tokens) > SHOWN_TOKENS else "")


def look_at_model(
  configs: Mapping[str, ConfigDict], batch: Batch, last: str, tokenizer: Tokenizer, steps: int
) -> Iterator[Finding]:
  """Builds the model; looks for leaks between packed examples and from later tokens; times training steps."""
  config = configs[last]
  model = loop.build_model(config, tokenizer)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  what = f"{config.architecture} {config.model.size}: {size:,} parameters, {size * 4 / 2**30:.2f} GiB in float32"
  yield Finding("info", "config.model", what)
  highest = max(int(batch[key].max()) for key in batch if key.endswith("_tokens"))
  if highest >= model.config.vocab_size:
    what = f"token id {highest} is beyond the vocabulary of {model.config.vocab_size}"
    yield Finding("error", "config.model", what, "use the tokenizer that the model was made for")
  whole = size <= PROBED_PARAMETERS
  probed = model if whole else _one_layer(config, tokenizer)
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    yield from probe(probed, jax.jit(probed.init)(jax.random.key(config.seed)), batch)
  if steps and whole:
    seconds = step_seconds(config, model, batch, steps)
    for name, own in configs.items():
      left = own.train.steps * seconds
      what = (
        f"{own.train.steps:,} steps of {seconds:.2f} s: {left / 3600:.1f} h"
        if left > 7200
        else (f"{own.train.steps:,} steps of {seconds:.2f} s: {left / 60:.1f} min")
      )
      yield Finding("info", f"stage {name}", f"estimate for this machine, evaluation apart: {what}")
  elif steps:
    yield Finding("info", "config.model", "too large to be timed here; no step was run")


def _one_layer(config: ConfigDict, tokenizer: Tokenizer) -> Model:
  config = config.copy_and_resolve_references()
  fields = ("encoder_layers", "decoder_layers") if config.architecture == "t5" else ("layers",)
  with config.unlocked():
    config.model.overrides.update(dict.fromkeys(fields, 1))
  return loop.build_model(config, tokenizer)


def probe(model: Model, params: Any, batch: Batch) -> Iterator[Finding]:
  """Changes tokens that a position must not see, and compares its features bit for bit."""
  segments = batch["decoder_segment_ids"]
  row = int(segments.max(axis=1).argmax())
  one = {key: value[row : row + 1] for key, value in batch.items()}
  segments = one["decoder_segment_ids"]
  run = jax.jit(model.features)
  before = np.asarray(run(params, on_mesh(one)))

  def changed(keep: np.ndarray, keep_encoder: np.ndarray | None) -> np.ndarray:
    other = dict(one)
    for key, kept in (("decoder_input_tokens", keep), ("encoder_input_tokens", keep_encoder)):
      if kept is not None and key in one:
        other[key] = np.where(kept, one[key], (one[key] + 1) % model.config.vocab_size).astype(np.int32)
    return np.asarray(run(params, on_mesh(other)))

  if segments.max() < 2:
    yield Finding("info", "packing", "no row holds two examples: nothing to leak")
  else:
    encoder = one["encoder_segment_ids"] != 1 if "encoder_segment_ids" in one else None
    seen = segments > 1
    if (changed(segments != 1, encoder)[seen] != before[seen]).any():
      what = "changing the first example of a packed row changes what the model computes for the others"
      yield Finding("error", "packing", what, "set data.packing=False, and report the attention that leaks")
    else:
      yield Finding("info", "packing", f"no leak between the {segments.max()} examples of a packed row, bit for bit")
  ends = np.flatnonzero(segments[0] == segments.max())
  first = int(ends[len(ends) // 2])  # within an example; a bidirectional prefix may be seen
  later = np.arange(segments.shape[1]) >= first
  later &= one["decoder_bidirectional"][0] == 0 if "decoder_bidirectional" in one else True
  earlier = np.arange(segments.shape[1]) < first
  if (changed(~later[None], None)[0, earlier] != before[0, earlier]).any():
    what = "changing later tokens changes what the model computes for earlier ones"
    yield Finding("error", "causality", what, "report the attention that looks ahead")
  else:
    yield Finding("info", "causality", "no position sees later ones, bit for bit")


def step_seconds(config: ConfigDict, model: Model, batch: Batch, steps: int) -> float:
  """Times real training steps, the first (compiling) one apart."""
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = loop.new_state(config, scratch_params(config, model, mesh), mesh)
    step, on_device = programs.make_train_step(config, model, mesh, int(batch["task_ids"].max()) + 1), on_mesh(batch)
    state, _ = step(state, on_device)
    jax.block_until_ready(state)
    began = time.monotonic()
    for _ in range(steps):
      state, _ = step(state, on_device)
    jax.block_until_ready(state)
    return (time.monotonic() - began) / steps
