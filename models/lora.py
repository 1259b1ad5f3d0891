"""Low-rank adapters: a frozen weight W is used as W + scale·a·b, and only a and b are trained (Hu et al. 2021).

Adapters are a nested dict of their own, beside the parameters: where those have `layers/attention/query`, adapters have
`layers/attention/query/lora_a` and `…/lora_b`. `combine` puts both together into a tree that a model computes with,
`merge` into plain parameters.

Axis letters: see `models/model.py`; R is the rank. `a` has the dims that `dense` contracts, then R; `b` has R, then the
weight's other dims: query DKGH has a DR and b RKGH; out KGHD has a KGHR and b RD. Stacked layers have L in front.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from models.module import InPlace, Params
from models.sharding import by_path

# The matrices that `models/layers.py: dense` applies -> how many of their dims, the first ones, it contracts.
MATRICES: tuple[tuple[str, int], ...] = (
  (r"(attention|cross)/(query|key|value)$", 1),  # DKGH, DKH
  (r"(attention|cross)/out$", 3),  # KGHD
  (r"mlp/(gate|up)$", 1),  # DF
  (r"mlp/down$", 1),  # FD
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(InPlace):
  """A weight with its adapter, in the weight's place in a tree of parameters; `dense` knows what to do with it.

  Attributes:
    base: the frozen weight.
    a, b: the adapter; layouts as the module says.
    scale: multiplies a·b.
  """

  base: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})


def contracted_dims(path: str) -> int | None:
  """Returns how many dims of a weight `dense` contracts (L apart), or None where it is no matrix of `dense`.

  Example:
    >>> contracted_dims("layers/attention/out"), contracted_dims("embed/tokens")
    (3, None)
  """
  return next((count for pattern, count in MATRICES if re.search(pattern, path)), None)


def scale_of(rank: int, alpha: float, rank_stabilised: bool) -> float:
  """Returns what multiplies a·b: `alpha / rank`, or `alpha / sqrt(rank)`.

  The square root keeps the size of the update, and of its gradient, the same at any rank, so that large ranks learn
  more than small ones (Kalajdzievski 2023).

  Example:
    >>> scale_of(16, 32.0, False), scale_of(16, 32.0, True)
    (2.0, 8.0)
  """
  return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def targeted(params: Params, targets: str) -> dict[str, Any]:
  """Finds the weights to adapt.

  Args:
    params: nested dict of arrays or shapes.
    targets: regex, searched for in each parameter's path.

  Returns:
    path -> weight.

  Raises:
    ValueError: the pattern matches nothing, or something that is not a matrix of `dense`; lists what can be adapted.
  """
  leaves = by_path(params)
  chosen = {path: leaf for path, leaf in leaves.items() if re.search(targets, path)}
  others = [path for path in chosen if contracted_dims(path) is None]
  if others or not chosen:
    found = f"matches {', '.join(others)}, which cannot have an adapter" if others else "matches no parameter"
    adaptable = ", ".join(path for path in leaves if contracted_dims(path) is not None)
    raise ValueError(f"config.lora.targets={targets!r} {found}; what can: {adaptable}")
  return chosen


def init(key: jax.Array, params: Params, *, rank: int, targets: str) -> Params:
  """Makes new adapters: `a` drawn evenly from ±fan_in^-0.5, which is what PEFT draws, and `b` zero.

  Args:
    key: each path draws with a key of its own, so that other targets do not change it.
    params: nested dict of arrays or shapes.
    rank: R, 1 or more.
    targets: see `targeted`.

  Returns:
    Nested dict of float32 adapters. With them the model computes what it computed without.

  Raises:
    ValueError: see `targeted`.
  """
  adapters = {}
  for path, leaf in targeted(params, targets).items():
    stacked = int("layers/" in path)
    layers, split = leaf.shape[:stacked], stacked + contracted_dims(path)
    inputs, outputs = leaf.shape[stacked:split], leaf.shape[split:]
    bound, own = math.prod(inputs) ** -0.5, jax.random.fold_in(key, zlib.crc32(path.encode()))
    adapters[f"{path}/lora_a"] = jax.random.uniform(own, (*layers, *inputs, rank), jnp.float32, -bound, bound)
    adapters[f"{path}/lora_b"] = jnp.zeros((*layers, rank, *outputs), jnp.float32)
  return unflatten_dict(adapters, sep="/")


def combine(trained: Params, frozen: Params, scale: float) -> Params:
  """Puts two trees together: a trained array stands where its path says, an adapter joins the weight of its path.

  Args:
    trained: nested dict of arrays or adapters.
    frozen: nested dict of arrays.
    scale: see `scale_of`.

  Returns:
    The whole tree, with `Adapted` in place of each weight that has an adapter.
  """
  if not isinstance(trained, Mapping):
    return trained
  if "lora_a" in trained:
    return Adapted(frozen, trained["lora_a"], trained["lora_b"], scale)
  return {**frozen, **{name: combine(part, frozen.get(name, {}), scale) for name, part in trained.items()}}


def merge(trained: Params, frozen: Params, scale: float) -> Params:
  """As `combine`, with W + scale·a·b in place of each weight that has an adapter: plain parameters, in W's dtype."""
  return jax.tree.map(_merged, combine(trained, frozen, scale), is_leaf=lambda leaf: isinstance(leaf, Adapted))


def _merged(leaf: jax.Array | Adapted) -> jax.Array:
  if not isinstance(leaf, Adapted):
    return leaf
  stacked = leaf.a.ndim + leaf.b.ndim - leaf.base.ndim - 2  # 1 where L stands in front
  layers = (tuple(range(stacked)),) * 2
  contract = ((leaf.a.ndim - 1,), (stacked,))
  # A TPU's default for float32 products is bfloat16: the merged weight would not be the one that was trained.
  product = jax.lax.dot_general(leaf.a, leaf.b, (contract, layers), precision=jax.lax.Precision.HIGHEST)
  return (leaf.base + leaf.scale * product).astype(leaf.base.dtype)
