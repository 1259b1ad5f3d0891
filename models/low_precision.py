"""Matrix products in 8 bits while training: forward in int8 or float8, gradients in the compute dtype.

Both factors of a product are quantised where it is made, with a scale for each row of activations and each output of a
weight (its largest magnitude), by the library qwix; sums are 32 bits wide. The gradient is that of the product without
quantisation (straight through: Bengio et al. 2013; Jacob et al. 2018), so that weights, stored in float32, learn what a
forward pass in 8 bits makes of them. Only training does so; whatever evaluates uses the weights as they are.
"""

import dataclasses
import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.lora import contracted_dims
from models.module import InPlace, Params
from models.sharding import in_auto, path_name, spec

MATMULS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised(InPlace):
  """A weight whose products are made in 8 bits, in the weight's place in a tree of parameters; `dense` knows it.

  Attributes:
    base: the weight.
    kind: a name in `MATMULS`.
  """

  base: jax.Array
  kind: str = dataclasses.field(metadata={"static": True})


def check(kind: str) -> None:
  """Refuses an unknown `config.model.matmul`, or one whose library is missing.

  Raises:
    ValueError: with what is known, or how to install it.
  """
  if kind != "default" and kind not in MATMULS:
    raise ValueError(f"config.model.matmul is {kind!r}; known: {['default', *MATMULS]}")
  if kind != "default" and importlib.util.find_spec("qwix") is None:
    raise ValueError(f"config.model.matmul={kind!r} needs qwix, which is not installed: pip install 'argot[quant]'")


def quantised(params: Params, kind: str) -> Params:
  """Marks every matrix of the layers, so that `dense` makes its products in 8 bits; "default" changes nothing."""
  if kind == "default":
    return params

  def mark(path: Any, leaf: jax.Array) -> Any:
    return leaf if contracted_dims(path_name(path)) is None else Quantised(leaf, kind)

  return jax.tree_util.tree_map_with_path(mark, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(equation: str, kind: str, out_dims: tuple, x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts activations with a weight in 8 bits.

  Args:
    equation: of `einsum`, such as `"BTD,DF->BTF"`.
    kind: a name in `MATMULS`.
    out_dims: mesh axis of each dim of the output.
    x, w: in the compute dtype.

  Returns:
    The product in x's dtype.
  """
  import qwix

  of_x, of_w, of_y = equation.replace("->", ",").split(",")

  def run(x: jax.Array, w: jax.Array) -> jax.Array:
    parts = [
      qwix.quantize(array, MATMULS[kind], channelwise_axes=[i for i, letter in enumerate(letters) if letter in of_y])
      for array, letters in ((x, of_x), (w, of_w))
    ]
    return qwix.einsum(equation, *parts).astype(x.dtype)

  return in_auto(run, spec(*out_dims))(x, w)  # qwix knows no explicit layouts


def _forward(equation, kind, out_dims, x, w):
  return product(equation, kind, out_dims, x, w), (x, w)


def _backward(equation, kind, out_dims, factors, cotangent):
  del kind
  plain = partial(jnp.einsum, equation, out_sharding=spec(*out_dims))
  return jax.vjp(plain, *factors)[1](cotangent)


product.defvjp(_forward, _backward)
