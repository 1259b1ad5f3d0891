"""The parts that both architectures are made of, and the scan that runs a stack of layers.

Axis letters: see `models/model.py`. Weights are stored float32 and split over `fsdp`; a use casts them to the compute
dtype, gathers them over `fsdp` (that is FSDP's all-gather, in the smaller dtype) and contracts.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import low_precision
from models.lora import Adapted
from models.module import Params
from models.sharding import BATCH, pin, platform, spec, split_over

Dims = tuple[str | tuple[str, ...] | None, ...]


def dense(
  equation: str, x: jax.Array, w: jax.Array | Adapted | low_precision.Quantised, w_dims: Dims, out_dims: Dims
) -> jax.Array:
  """Contracts activations with a weight.

  Args:
    equation: an einsum such as `"BTD,DF->BTF"`; the weight's contracted dims come first.
    x: activations, in the compute dtype.
    w: float32 weight, or one with an adapter, or one whose products are made in 8 bits.
    w_dims: mesh axis of each dim of `w` in use, that is without `fsdp`.
    out_dims: mesh axis of each dim of the output.

  Returns:
    The product in `x`'s dtype.
  """
  if isinstance(w, Adapted):
    y = dense(equation, x, w.base, w_dims, out_dims)
    return y + w.scale * _low_rank(equation, x, w, w_dims, out_dims)
  if isinstance(w, low_precision.Quantised):
    return low_precision.product(equation, w.kind, tuple(out_dims), x, pin(w.base.astype(x.dtype), *w_dims))
  w = pin(w.astype(x.dtype), *w_dims)
  if platform() == "cpu" and out_dims[1] is None:
    return _flat(equation, x, w, w_dims, out_dims)
  return jnp.einsum(equation, x, w, out_sharding=spec(*out_dims))


def _flat(equation: str, x: jax.Array, w: jax.Array, w_dims: Dims, out_dims: Dims) -> jax.Array:
  """Contracts as one product of two matrices, tokens by whatever is contracted or kept.

  Over rows and tokens together, a weight's gradient is a sum for which a CPU reads its arguments as they lie; over two
  dims of their own, XLA transposes the gradient of every activation first, at a tenth of the memory's speed.
  """
  of_x, of_w, of_y = re.split(",|->", equation)
  count = sum(letter in of_x for letter in of_w)  # contracted: the last of x and the first of w
  rows, kept = x.shape[: len(of_x) - count], w.shape[count:]
  inner = math.prod(w.shape[:count])
  x_NI = jax.lax.reshape(x, (math.prod(rows), inner), out_sharding=spec(out_dims[0], w_dims[0]))
  w_IO = jax.lax.reshape(w, (inner, math.prod(kept)), out_sharding=spec(w_dims[0], w_dims[count]))
  y_NO = jnp.einsum("NI,IO->NO", x_NI, w_IO, out_sharding=spec(out_dims[0], w_dims[count]))
  return jax.lax.reshape(y_NO, (*rows, *kept), out_sharding=spec(*out_dims))


def _low_rank(equation: str, x: jax.Array, w: Adapted, w_dims: Dims, out_dims: Dims) -> jax.Array:
  """Returns (x·a)·b: through the rank R, so that neither a·b nor a weight's whole gradient is ever built."""
  of_x, of_w, of_y = re.split(",|->", equation)
  contracted = "".join(letter for letter in of_w if letter not in of_y)
  kept, rows = of_w.removeprefix(contracted), "".join(letter for letter in of_x if letter in of_y)
  count, axis = len(contracted), dict(zip(of_y, out_dims, strict=True))
  low_dims = tuple(axis[letter] for letter in rows) + (None,)
  low = dense(f"{of_x},{contracted}R->{rows}R", x, w.a, (*w_dims[:count], None), low_dims)
  return dense(f"{rows}R,R{kept}->{of_y}", low, w.b, (None, *w_dims[count:]), out_dims)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds in float32, so that the bias's gradient, a sum over all tokens, is made in it, too; returns x's dtype."""
  return (x.astype(jnp.float32) + bias).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
  """A parameter drawn from N(0, stddev²)."""
  return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def zeros(shape: tuple[int, ...]) -> nnx.Param:
  """A parameter of zeros (a bias)."""
  return nnx.Param(jnp.zeros(shape, jnp.float32))


class RMSNorm(nnx.Module):
  """Divides by the root mean square over D, in float32; no mean, no bias (Zhang & Sennrich 2019)."""

  def __init__(self, dim: int, eps: float):
    self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * inverse * self.factor()).astype(x.dtype)

  def factor(self) -> jax.Array:
    """Returns what each of D is multiplied by."""
    return self.scale[...]


class RMSNormPlusOne(RMSNorm):
  """RMSNorm that multiplies by one plus its scale, which starts at 0 (Gemma's; the scale is stored as published)."""

  def __init__(self, dim: int, eps: float):
    super().__init__(dim, eps)
    self.scale = zeros((dim,))

  def factor(self) -> jax.Array:
    """Returns what each of D is multiplied by."""
    return 1.0 + self.scale[...]


class LayerNorm(nnx.Module):
  """Normalises mean and variance over D, in float32, with scale and bias (GPT-2's)."""

  def __init__(self, dim: int, eps: float):
    self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
    self.bias = zeros((dim,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
    return (centred * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS: dict[str, Callable[[int, float], nnx.Module]] = {
  "rmsnorm": RMSNorm,
  "rmsnorm_plus_one": RMSNormPlusOne,
  "layernorm": LayerNorm,
}


class Embedding(nnx.Module):
  """Token vectors, plus learned position vectors where the architecture has them."""

  def __init__(self, rngs: nnx.Rngs, vocab_size: int, dim: int, stddev: float, dtype: str, max_length: int = 0):
    self.tokens = normal(rngs, (vocab_size, dim), stddev)
    if max_length:
      self.positions = normal(rngs, (max_length, dim), stddev)
    self.dtype = dtype

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    x_BTD = look_up(self.dtype, self.tokens[...], tokens_BT)
    if hasattr(self, "positions"):
      x_BTD += look_up(self.dtype, self.positions[...], positions_BT)
    return x_BTD


def _rows(dtype: str, table: jax.Array, index_BT: jax.Array) -> jax.Array:
  # Gathering the (cast) table first keeps XLA from replicating the whole lookup ("involuntary full
  # rematerialization"): each device then reads the rows of its own batch.
  table = pin(table.astype(dtype), None, None)
  return table.at[index_BT].get(out_sharding=spec(BATCH, split_over(index_BT), None))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(dtype: str, table: jax.Array, index_BT: jax.Array) -> jax.Array:
  """Returns rows of a table [V,D] in a dtype, [B,T,D]; their gradient is summed in float32, whatever the dtype.

  In bfloat16 256 + 1 is 256: a token that occurs often would add nothing more.
  """
  return _rows(dtype, table, index_BT)


def _look_up_forward(dtype: str, table: jax.Array, index_BT: jax.Array) -> tuple[jax.Array, tuple]:
  return _rows(dtype, table, index_BT), (table, index_BT)


def _look_up_backward(dtype: str, kept: tuple, cotangent_BTD: jax.Array) -> tuple[jax.Array, None]:
  del dtype
  table, index_BT = kept
  _, back = jax.vjp(lambda table: _rows("float32", table, index_BT), table)
  return back(cotangent_BTD.astype(jnp.float32))[0], None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Head(nnx.Module):
  """The output matrix of a model that does not share it with the embedding."""

  def __init__(self, rngs: nnx.Rngs, dim: int, vocab_size: int, stddev: float):
    self.kernel = normal(rngs, (dim, vocab_size), stddev)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": partial(jax.nn.gelu, approximate=True),  # by tanh
  "gelu_exact": partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
  """`down(activation(up(x)))`, or gated: `down(activation(gate(x)) * up(x))`."""

  def __init__(
    self, rngs: nnx.Rngs, dim: int, hidden: int, activation: str, gated: bool, bias: bool, stddevs: tuple[float, float]
  ):
    into, out_of = stddevs
    self.up = normal(rngs, (dim, hidden), into)
    if gated:
      self.gate = normal(rngs, (dim, hidden), into)
    self.down = normal(rngs, (hidden, dim), out_of)
    if bias:
      self.up_bias, self.down_bias = zeros((hidden,)), zeros((dim,))
    self.activation, self.gated, self.bias = activation, gated, bias

  def __call__(self, x_BTD: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """Returns [B,T,D]; a share `rate` of the hidden activations is dropped (T5's) if there is a key."""
    activate, rows = ACTIVATIONS[self.activation], (BATCH, split_over(x_BTD))
    into = partial(dense, "BTD,DF->BTF", x_BTD, w_dims=(None, "tensor"), out_dims=(*rows, "tensor"))
    up_BTF = into(w=self.up[...])
    if self.bias:
      up_BTF = add_bias(up_BTF, self.up_bias[...])
    up_BTF = checkpoint_name(up_BTF, "up")
    h_BTF = activate(checkpoint_name(into(w=self.gate[...]), "gate")) * up_BTF if self.gated else activate(up_BTF)
    h_BTF = dropout(h_BTF, rate, key, (*rows, "tensor"))
    y_BTD = dense("BTF,FD->BTD", h_BTF, self.down[...], ("tensor", None), (*rows, None))
    return add_bias(y_BTD, self.down_bias[...]) if self.bias else y_BTD


def dropout(x: jax.Array, rate: float, key: jax.Array | None, dims: Dims | None = None) -> jax.Array:
  """Zeroes a share `rate` of entries and scales up the rest; `key=None` or rate 0 returns `x` as it is.

  Args:
    x: activations.
    rate: the share.
    key: of the draws.
    dims: mesh axis of each dim of `x`; None = those of [B,T,D].
  """
  if key is None or rate == 0.0:
    return x
  dims = (BATCH, split_over(x), None) if dims is None else dims
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=spec(*dims))
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
  """Derives a key; no key stays none."""
  return None if key is None else jax.random.fold_in(key, number)


_POLICIES = jax.checkpoint_policies
# What the backward pass finds saved; the rest of a layer is computed again.
REMAT: dict[str, Callable[..., Any] | None] = {
  "none": None,  # everything saved, nothing recomputed
  "full": _POLICIES.nothing_saveable,
  "dots": _POLICIES.dots_with_no_batch_dims_saveable,
}
# What a policy may save by name, such as "qkv+gate": memory against time, in steps between "full" and "dots".
SAVED: dict[str, tuple[str, ...]] = {
  "qkv": ("query", "key", "value"),  # ready for attention: normalised and turned
  "query": ("query",),
  "key": ("key",),
  "value": ("value",),
  "attention": ("attention",),  # its result (and a kernel's normalisers), before the output projection
  "out": ("out",),  # the output projection's result
  "gate": ("gate",),  # an MLP's projections, before the activation
  "up": ("up",),
}


def remat_policy(name: str) -> Callable[..., Any] | None:
  """Returns the policy of `jax.checkpoint` that a config names, None for no remat.

  Args:
    name: in `REMAT`, or names in `SAVED` joined by "+".

  Raises:
    ValueError: neither.
  """
  if name in REMAT:
    return REMAT[name]
  if unknown := set(name.split("+")) - set(SAVED):
    raise ValueError(
      f"config.model.remat is {name!r}; known: {sorted(REMAT)}, or what to save, of {sorted(SAVED)}, joined by '+'; "
      f"got {sorted(unknown)}"
    )
  return _POLICIES.save_only_these_names(*(part for group in name.split("+") for part in SAVED[group]))


def run_layers(layer: Callable[..., Any], x: jax.Array, stacked: Params, extra: Any, remat: str, unroll: int):
  """Runs a stack of layers by `lax.scan`.

  Args:
    layer: `(x, params of one layer, extra of one layer) -> (x, output)`.
    x: [B,T,D] input of the first layer.
    stacked: parameters with L on axis 0; or, from `unstack`, a list of the layers' own: then there is no loop.
    extra: a tuple of what goes with each layer, such as numbers or a cache: trees with L on axis 0, lists, or None.
    remat: see `remat_policy`.
    unroll: layers in one iteration of the loop; L (or more) means no loop.

  Returns:
    The last layer's x, and the layers' outputs stacked on axis 0 (or as a list).
  """
  if isinstance(stacked, list):
    outputs = []
    for number, weights in enumerate(stacked):
      own = (part[number] if isinstance(part, list) else jax.tree.map(itemgetter(number), part) for part in extra)
      x, output = layer(x, weights, tuple(own))
      outputs.append(output)
    return x, outputs
  count = jax.tree.leaves(stacked)[0].shape[0]
  unroll = min(max(unroll, 1), count)
  if (policy := remat_policy(remat)) is not None:
    # Without a loop XLA would find what is computed again to be there already, and keep it.
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=unroll == count)
  return jax.lax.scan(lambda carry, xs: layer(carry, xs[0], xs[1]), x, (stacked, extra), unroll=unroll)


def unstack(stacked: Params) -> list[Params]:
  """Returns each layer's own part of a tree that has L on axis 0."""
  return [jax.tree.map(itemgetter(number), stacked) for number in range(jax.tree.leaves(stacked)[0].shape[0])]
