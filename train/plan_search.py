"""`argot plan --search`: tries meshes, rows and remat within a time budget, and ranks what fits by time a token.

What cannot fit is left out before it is compiled: parameters, optimizer, gradients and what the layers hand to the
backward pass are known by arithmetic, and are a lower bound. The rest is tried in the order of a rough guess; for each
mesh, remat and attention from the most rows downwards, until one fits: more rows use a chip better, and what does not
fit with some rows does not with more.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs.base import get_config
from models import Model
from models.layers import REMAT, SAVED
from models.sharding import AXES, by_path, param_specs
from train.chips import Chip
from train.flops import model_flops, row_lengths
from train.loop import build_model
from train.optimizer import build_optimizer
from train.plan import GIB, Plan, Topology, open_topology, plan, vocabulary
from train.plan_report import mesh_text
from train.stage import flat
from train.tuning import build_tuning

# What a policy computes again, as a share of the model's FLOPs: the guess that orders the trials, and nothing more.
_AGAIN = {"none": 0.0, "full": 1 / 3}
_GUESSED_SHARE = 0.6  # of the peak


class Candidate(NamedTuple):
  """One setting.

  Attributes:
    mesh: sizes of `AXES`.
    rows: of each chip.
    varied: further keys of the config and their values.
  """

  mesh: tuple[int, ...]
  rows: int
  varied: tuple[tuple[str, Any], ...]

  def overrides(self) -> dict[str, Any]:
    """Returns the config keys that make this setting."""
    mesh = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)}
    return {**mesh, "data.batch_size": self.rows * math.prod(self.mesh), **dict(self.varied)}

  def apply(self, config: ConfigDict) -> ConfigDict:
    """Returns the config with this setting."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(self.overrides())
    return config


class Trial(NamedTuple):
  """A setting that was tried: its plan, or why there is none."""

  candidate: Candidate
  plan: Plan | None
  reason: str = ""


class Shapes(NamedTuple):
  """What arithmetic needs of a config, made once.

  Attributes:
    model: the model; its choices are the config's, not a candidate's.
    params: shapes.
    frozen: those of them that are not trained.
    trained_bytes: of what is trained, whole; gradients are as large.
    opt_bytes: of the optimizer's state, whole; 0 where it lies in the host's memory.
    microbatches: of a step; the config's, where it is not varied.
    lengths: S (0 without an encoder) and T.
  """

  model: Model
  params: Any
  frozen: Any
  trained_bytes: int
  opt_bytes: int
  microbatches: int
  lengths: tuple[int, int]


def shapes_of(config: ConfigDict) -> Shapes:
  """Returns the shapes of a config."""
  model = build_model(config, vocabulary(config))
  params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  trained, frozen = build_tuning(config).like(params)
  opt = jax.eval_shape(build_optimizer(config.optimizer, config.train.steps).init, trained)
  sizes = _size(trained), 0 if config.optimizer.offload else _size(opt)
  return Shapes(model, params, frozen, *sizes, config.train.accumulation_steps, row_lengths(config))


def _size(tree: Any) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def divides(params: Any, mesh: tuple[int, ...]) -> bool:
  """Returns whether every parameter's dims divide by the mesh axes that split them."""
  sizes = dict(zip(AXES, mesh, strict=True))
  leaves, specs = jax.tree.leaves(params), jax.tree.leaves(param_specs(params), is_leaf=lambda x: isinstance(x, P))
  return all(
    leaf.shape[dim] % sizes[axis] == 0
    for leaf, spec in zip(leaves, specs, strict=True)
    for dim, axis in enumerate(spec)
    if axis is not None
  )


def least_bytes(shapes: Shapes, candidate: Candidate) -> int:
  """Returns a lower bound on a chip's memory: the state, gradients, and each layer's input for the backward pass.

  All of the state is taken to be split over fsdp and tensor. Gradients are as large as the parameters at the end of the
  backward pass, when no layer's input is left: the larger of the two counts. A layer also keeps what remat saves by
  name; with "none" at least what goes into its MLP's last product.
  """
  data, fsdp, context, tensor = candidate.mesh
  c, (long, short) = shapes.model.config, shapes.lengths
  stacks = [(c.encoder_layers, long), (c.decoder_layers, short)] if long else [(c.layers, short)]
  width = c.embed_dim + _saved_width(shapes, remat_of(shapes, candidate), tensor)
  microbatches = dict(candidate.varied).get("train.accumulation_steps", shapes.microbatches)
  rows = candidate.rows * tensor // microbatches  # at a time, of one group of data, fsdp and context, in whole rows
  kept = sum(layers * length for layers, length in stacks) * rows * width * jnp.dtype(c.dtype).itemsize
  state = _size(shapes.frozen) + shapes.trained_bytes + shapes.opt_bytes
  return state // (fsdp * tensor) + max(shapes.trained_bytes // (fsdp * tensor), kept)


def _saved_width(shapes: Shapes, remat: str, tensor: int) -> int:
  """Returns the numbers a token that a layer keeps on a chip, for certain, beside its input."""
  c, paths = shapes.model.config, by_path(shapes.params)
  if remat in REMAT:
    return c.mlp_dim // tensor if remat == "none" else 0
  heads, kv_heads = c.heads * c.head_dim // tensor, getattr(c, "kv_heads", c.heads) * c.head_dim // tensor
  mlp = c.mlp_dim // tensor
  widths = {"query": heads, "key": kv_heads, "value": kv_heads, "attention": heads, "out": c.embed_dim, "up": mlp}
  widths["gate"] = mlp if any(path.endswith("mlp/gate") for path in paths) else 0
  return sum(widths[name] for group in remat.split("+") for name in SAVED[group])


def remat_of(shapes: Shapes, candidate: Candidate) -> str:
  """Returns the candidate's remat, or the config's where it is not varied."""
  return dict(candidate.varied).get("model.remat", shapes.model.config.remat)


def guess(shapes: Shapes, candidate: Candidate, chip: Chip) -> float:
  """Returns roughly how many seconds a token takes a chip; only the order of trials depends on it."""
  data, fsdp, context, tensor = candidate.mesh
  chips, (long, short) = math.prod(candidate.mesh), shapes.lengths
  rows, c = candidate.rows * chips, shapes.model.config
  flops = model_flops(shapes.model, shapes.params, rows, long, short, shapes.frozen) / chips
  work = flops * (1 + _AGAIN.get(remat_of(shapes, candidate), 0.1)) / (chip.peak * _GUESSED_SHARE)
  links = 2 * chip.link
  weights = 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)) / tensor  # bfloat16
  gathers = 2 if remat_of(shapes, candidate) == "none" else 3
  gathered = weights * gathers * (fsdp > 1) + 2 * weights * (data * fsdp * context > 1)
  layers = getattr(c, "layers", 0) or c.encoder_layers + c.decoder_layers
  exchanged = 8 * layers * candidate.rows * tensor * max(long, short) * c.embed_dim * 2 * (tensor > 1)
  return (work + exchanged / links + max(gathered / links - work, 0)) / (rows * (long + short))


def candidates(
  shapes: Shapes, chip: Chip, chips: int, rows: Sequence[int], vary: Mapping[str, Sequence[Any]]
) -> tuple[list[list[Candidate]], int]:
  """Makes the settings to try.

  Args:
    shapes: of the config.
    chip: what it runs on.
    chips: how many.
    rows: rows of each chip to try.
    vary: key of the config -> values to try; only those of "mesh.context" are tried for that axis, 1 without any.

  Returns:
    Lines, the most promising first: settings that differ in rows only, from the most rows that may fit downwards. And
    how many settings were left out, because they cannot fit.
  """
  found, left_out = [], 0
  contexts, vary = vary.get("mesh.context", [1]), {key: vary[key] for key in vary if key != "mesh.context"}
  for mesh in meshes(chips, contexts):
    if not divides(shapes.params, mesh):
      continue
    for values in itertools.product(*vary.values()):
      line = [Candidate(mesh, count, tuple(zip(vary, values, strict=True))) for count in sorted(rows, reverse=True)]
      fitting = [candidate for candidate in line if least_bytes(shapes, candidate) <= chip.hbm_gib * GIB]
      left_out += len(line) - len(fitting)
      if fitting:
        found.append(fitting)
  # Equal in two digits is equal: then what splits parameters most comes first, for it leaves room for the most rows.
  return sorted(found, key=lambda line: float(f"{guess(shapes, line[0], chip):.2g}")), left_out


def parse_vary(text: str, config: ConfigDict) -> dict[str, list[Any]]:
  """Reads what a search varies, with values of the types that the config has.

  Args:
    text: "KEY=VALUE,VALUE;KEY=VALUE,…", keys of the config.
    config: the config.

  Raises:
    ValueError: not of that form, an unknown key, or a value of another type.

  Example:
    >>> parse_vary("model.remat=full,none;model.scan_unroll=1,2", get_config())
    {'model.remat': ['full', 'none'], 'model.scan_unroll': [1, 2]}
  """
  found: dict[str, list[Any]] = {}
  known = flat(config.to_dict())
  for part in filter(None, text.split(";")):
    key, _, values = part.partition("=")
    if key not in known or not values or not isinstance(known[key], (str, int, float)):
      raise ValueError(f"--vary={text}: expected KEY=VALUE,VALUE;KEY=… with keys such as model.remat, got {part!r}")
    kind = type(known[key])
    read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
    try:
      found[key] = [read(value) for value in values.split(",")]
    except (ValueError, KeyError) as error:
      raise ValueError(f"--vary={text}: values of {key} are of type {kind.__name__}, got {values!r}") from error
  return found


def meshes(chips: int, contexts: Sequence[int] = (1,)) -> list[tuple[int, int, int, int]]:
  """Returns all sizes of `AXES`, (data, fsdp, context, tensor), that multiply to a number of chips.

  Args:
    chips: how many.
    contexts: sizes of context.

  Example:
    >>> meshes(2)
    [(1, 1, 1, 2), (1, 2, 1, 1), (2, 1, 1, 1)]
  """
  divisors = [size for size in range(1, chips + 1) if chips % size == 0]
  sizes = itertools.product(divisors, divisors, contexts, divisors)
  return [mesh for mesh in sizes if math.prod(mesh) == chips]


def search(
  lines: Sequence[Sequence[Candidate]],
  run: Callable[[Candidate, float], Trial],
  seconds: float,
  say: Callable[[str], None],
) -> list[Trial]:
  """Tries settings until the time is over, all are tried, or Ctrl-C; returns what was tried, the best first.

  Args:
    lines: from `candidates`.
    run: compiles a setting in so many seconds or raises TimeoutError; see `compiler`.
    seconds: of wall time; the compile in hand ends with them.
    say: prints a line.
  """
  trials: list[Trial] = []
  end = time.monotonic() + seconds
  try:
    for number, line in enumerate(lines, 1):
      for candidate in line:
        trials.append(run(candidate, max(end - time.monotonic(), 0.0)))
        left = max(end - time.monotonic(), 0)
        say(f"line {number} of {len(lines)}, {left:,.0f} s left: {describe(trials[-1])}")
        if trials[-1].plan is not None:
          break
  except TimeoutError:
    say(f"the {seconds:,.0f} seconds are over")
  except KeyboardInterrupt:
    say("stopped")
  return sorted(trials, key=seconds_a_token)


def explore(
  config: ConfigDict,
  topology: Topology,
  rows: Sequence[int],
  vary: Mapping[str, Sequence[Any]],
  seconds: float,
  say: Callable[[str], None],
) -> list[Trial]:
  """Makes a config's candidates and tries them; see `candidates` and `search`."""
  lines, left_out = candidates(shapes_of(config), topology.chip, len(topology.devices), rows, vary)
  say(f"{sum(map(len, lines))} settings in {len(lines)} lines; {left_out} more cannot fit")
  with compiler(config, topology.name) as run:
    return search(lines, run, seconds, say)


@contextlib.contextmanager
def compiler(config: ConfigDict, topology: str) -> Iterator[Callable[[Candidate, float], Trial]]:
  """Yields a function that compiles a setting in a process of its own: it can be stopped, and its memory comes back.

  It takes the setting and most seconds, and raises a TimeoutError where they are over.
  """
  context, running = multiprocessing.get_context("spawn"), []

  def start() -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, config.to_json(), topology), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    running[:] = [process, ours]

  def run(candidate: Candidate, seconds: float) -> Trial:
    if not running:
      start()
    process, pipe = running
    try:
      pipe.send(candidate)
      if pipe.poll(seconds):
        return pipe.recv()
      raise TimeoutError
    except (EOFError, ConnectionError):  # the system took the process for its memory, or libtpu aborted
      process.join()
      running.clear()
      return Trial(candidate, None, f"the compiling process ended with exit code {process.exitcode}")

  try:
    yield run
  finally:
    if running:
      running[0].kill()  # libtpu answers a gentler signal with a stack trace


def _serve(pipe: Connection, config: str, topology: str) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
  base, opened = get_config(), open_topology(topology)
  with base.unlocked():
    base.update(json.loads(config))
  while True:
    pipe.send(_try(pipe.recv(), base, opened))


def seconds_a_token(trial: Trial) -> float:
  """Returns the `mid` estimate by token; infinite where there is no plan."""
  return trial.plan.estimate.mid / trial.plan.tokens if trial.plan else math.inf


def _try(candidate: Candidate, config: ConfigDict, topology: Topology) -> Trial:
  try:
    made = plan(candidate.apply(config), topology)
  except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return Trial(candidate, None, str(error).splitlines()[0])
  if made.memory.total > made.memory.capacity:
    return Trial(candidate, None, f"needs {made.memory.total / GIB:.1f} GiB")
  return Trial(candidate, made)


def describe(trial: Trial) -> str:
  """Returns a trial in one line."""
  setting, made = trial.candidate, trial.plan
  mesh = mesh_text(dict(zip(AXES, setting.mesh, strict=True)))
  text = ", ".join([mesh, f"{setting.rows} rows a chip", *(f"{key} {value}" for key, value in setting.varied)]) + ": "
  if made is None:
    return text + trial.reason
  found = made.estimate
  return (
    f"{text}{made.memory.total / GIB:.1f} GiB, est. {found.mid * 1e3:,.0f} ms ({found.roof * 1e3:,.0f}–"
    f"{found.cyc * 1e3:,.0f}), MFU {made.mfu(found.mid):.3f}"
  )


def flag_lines(candidate: Candidate) -> str:
  """Returns a setting as flags, one a line, for `argot train … $(cat FILE)`."""
  return "".join(f"--config.{key}={value}\n" for key, value in candidate.overrides().items())
