"""The boundary between Flax NNX and plain functions: the only file that splits and merges NNX modules.

Carrying NNX objects through `jax.jit` costs every step (they are flattened and rebuilt around it), so a module is taken
apart once, here, into `init` and `apply` over a nested dict of arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

Params = dict[str, Any]


class Pure(NamedTuple):
  """A module as two pure functions.

  Attributes:
    init: `key -> params`, a nested dict of float32 arrays.
    apply: `(params, *args, **kwargs) -> output` of the module's `__call__`.
  """

  init: Callable[[jax.Array], Params]
  apply: Callable[..., Any]


def pure(make: Callable[[nnx.Rngs], nnx.Module]) -> Pure:
  """Turns a module's constructor into pure functions.

  Args:
    make: builds the module from `nnx.Rngs`; every array of the module must be an `nnx.Param`.

  Returns:
    The module's `init` and `apply`.
  """
  graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def init(key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

  def apply(params: Params, *args, **kwargs):
    return nnx.merge(graph, params)(*args, **kwargs)

  return Pure(init, apply)


def stack_init(layer: Pure, count: int) -> Callable[[jax.Array], Params]:
  """Returns an `init` for `count` copies of a layer, each parameter stacked on a new axis 0 (L)."""
  return lambda key: jax.vmap(layer.init)(jax.random.split(key, count))


class InPlace:
  """What stands in a weight's place in a tree of parameters; read as an `nnx.Param` is, by `[...]`."""

  def __getitem__(self, index: Any) -> "InPlace":
    """Returns itself for `[...]`.

    Raises:
      TypeError: another index.
    """
    if index is not Ellipsis:
      raise TypeError(f"a weight that is {type(self).__name__.lower()} is read as a whole, by [...]; got [{index!r}]")
    return self
