"""What of a model is trained: all of it, or adapters beside frozen weights. The rest need not know which."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from models import lora
from models.module import Params
from models.sharding import param_shardings
from train.step import all_trained

ADAPTER_KEY = 1_000_033  # folded into the seed's key, apart from the keys of steps and parameters


class Tuning(NamedTuple):
  """How a model's parameters divide into those that are trained and those that are frozen.

  Attributes:
    partial: whether a part is frozen. That part is in no checkpoint: it comes from where the stage started.
    split: `params -> (trained, frozen)` at the start of a stage; call under `jax.set_mesh`.
    like: shapes of params -> shapes of what is trained.
    join: `(trained, frozen) -> params`, for the step.
    merge: `(trained, frozen) -> params`, plain arrays.
  """

  partial: bool
  split: Callable[[Params], tuple[Params, Params]]
  like: Callable[[Any], Any]
  join: Callable[[Params, Params], Params]
  merge: Callable[[Params, Params], Params]


FULL = Tuning(False, lambda params: (params, {}), lambda shapes: shapes, all_trained, all_trained)


def build_tuning(config: ConfigDict) -> Tuning:
  """Builds what `config.lora` asks for."""
  return adapters(config.lora, config.seed) if config.lora.rank else FULL


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

  def like(shapes: Any) -> Any:
    return jax.eval_shape(lambda: start(shapes))

  def split(params: Params) -> tuple[Params, Params]:
    shapes = jax.eval_shape(lambda: params)
    layout = param_shardings(like(shapes), jax.sharding.get_mesh())
    return jax.jit(lambda: start(shapes), out_shardings=layout)(), params

  return Tuning(True, split, like, partial(lora.combine, scale=scale), partial(lora.merge, scale=scale))


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
