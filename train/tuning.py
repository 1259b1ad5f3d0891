"""What of a model is trained: all of it, adapters beside frozen weights, or all but what a path names.

The rest need not know which.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from models import lora
from models.module import Params
from models.sharding import by_path, param_shardings
from train.step import all_trained

ADAPTER_KEY = 1_000_033  # folded into the seed's key, apart from the keys of steps and parameters


class Tuning(NamedTuple):
  """How a model's parameters divide into those that are trained and those that are frozen.

  Attributes:
    partial: whether what is frozen is in no checkpoint: it comes from where the stage started.
    split: `params -> (trained, frozen)` at the start of a stage, and of a complete checkpoint; call under
      `jax.set_mesh`.
    like: shapes of params -> shapes of what is trained and of what is frozen.
    join: `(trained, frozen) -> params`, for the step.
    merge: `(trained, frozen) -> params`, plain arrays.
    store: `(trained, frozen) -> what a checkpoint holds as its parameters`.
  """

  partial: bool
  split: Callable[[Params], tuple[Params, Params]]
  like: Callable[[Any], tuple[Any, Any]]
  join: Callable[[Params, Params], Params]
  merge: Callable[[Params, Params], Params]
  store: Callable[[Params, Params], Params]


FULL = Tuning(False, lambda params: (params, {}), lambda shapes: (shapes, {}), all_trained, all_trained, all_trained)


def build_tuning(config: ConfigDict) -> Tuning:
  """Builds what `config.lora` and `config.train.frozen` ask for.

  Raises:
    ValueError: both are set, rank or alpha is out of its range, or a pattern is no regular expression.
  """
  for key, pattern in (("lora.targets", config.lora.targets), ("train.frozen", config.train.frozen)):
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"config.{key}={pattern!r} is no regular expression ({error})") from error
  if config.lora.rank < 0:
    raise ValueError(f"config.lora.rank is {config.lora.rank}; expected 1 or more, or 0: full fine-tuning")
  if config.lora.rank and config.lora.alpha <= 0:
    raise ValueError(f"config.lora.alpha is {config.lora.alpha}; expected more than 0: adapters times 0 learn nothing")
  if config.lora.rank and config.train.frozen:
    raise ValueError(
      f"config.train.frozen is {config.train.frozen!r} and config.lora.rank {config.lora.rank}: adapters freeze every "
      "weight; choose where they go by config.lora.targets, and set train.frozen to ''"
    )
  if config.train.frozen:
    return frozen_paths(config.train.frozen)
  return adapters(config.lora, config.seed) if config.lora.rank else FULL


def frozen_paths(pattern: str) -> Tuning:
  """All of a model but the parameters whose paths match: those have no gradient and no optimizer state.

  Checkpoints are complete, so that whatever loads the stage needs nothing else.

  Args:
    pattern: regex, searched for in each path.

  Returns:
    The tuning; its `split` and `like` raise a ValueError where the pattern matches no parameter, or all.
  """

  def split(params: Params) -> tuple[Params, Params]:
    leaves = by_path(params)
    found = [path for path in leaves if re.search(pattern, path)]
    if not found or len(found) == len(leaves):
      raise ValueError(
        f"config.train.frozen={pattern!r} matches {'every parameter' if found else 'no parameter'}; "
        f"they are {', '.join(leaves)}"
      )
    parts = ({p: x for p, x in leaves.items() if (p in found) == which} for which in (False, True))
    trained, frozen = (unflatten_dict(part, sep="/") for part in parts)
    return trained, frozen

  join = partial(lora.combine, scale=0.0)  # no adapters: it only puts the two trees together
  return Tuning(False, split, split, join, join, join)


def adapters(settings: ConfigDict, seed: int) -> Tuning:
  """Low-rank adapters on frozen weights; see `models/lora.py`.

  Args:
    settings: `config.lora`.
    seed: of the adapters' start.
  """
  make = partial(lora.init, rank=settings.rank, targets=settings.targets)
  scale = lora.scale_of(settings.rank, settings.alpha, settings.rank_stabilised)

  def start(shapes: Any) -> Params:
    return make(jax.random.fold_in(jax.random.key(seed), ADAPTER_KEY), shapes)

  def like(shapes: Any) -> tuple[Any, Any]:
    return jax.eval_shape(lambda: start(shapes)), shapes

  def split(params: Params) -> tuple[Params, Params]:
    shapes = jax.eval_shape(lambda: params)
    layout = param_shardings(like(shapes)[0], jax.sharding.get_mesh())
    return jax.jit(lambda: start(shapes), out_shardings=layout)(), params

  join, merge = partial(lora.combine, scale=scale), partial(lora.merge, scale=scale)
  return Tuning(True, split, like, join, merge, all_trained)


def about(trained: Params, frozen: Params) -> str:
  """Says how many of how many parameters are trained.

  Example:
    >>> about({"a": jax.numpy.zeros(5)}, {"w": jax.numpy.zeros((10, 10))})
    '5 parameters are trained beside 100 frozen ones (4.8 % of all)'
  """
  own, rest = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, frozen))
  if not rest:
    return f"all {own:,} parameters are trained"
  return f"{own:,} parameters are trained beside {rest:,} frozen ones ({100 * own / (own + rest):.1f} % of all)"
