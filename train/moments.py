"""An optimizer's moments between steps: in fewer bits, or in the host's memory.

Both wrap an optax transformation and change only how its state is kept. What is a moment says its name in optax's
states: `mu` (of gradients, signed) or `nu` (of their squares).

Rounding is random and unbiased: a moment moves by about (1 - b) of itself in a step, less than the grid's step, and
rounding to nearest would leave it where it is for ever. The draws depend on the count of steps only, so a run that goes
on from a checkpoint is the same bit for bit.

8 bits: each block of up to 128 entries along the last dim has a float32 scale, its largest magnitude, and each entry a
code c on a grid that is fine near 0, scale · (c / 127)² with c's sign for `mu`, scale · (c / 255)⁴ for `nu`; the idea
of blocks and of an uneven grid is that of Dettmers et al. 2021. A `nu` that is not 0 is never rounded to 0, since
updates are divided by its root.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from models.sharding import in_auto, path_name, spec

BLOCK = 128  # entries that share a scale, at the most
WHOLE_BELOW = 4096  # entries; smaller moments stay float32
KEY = 20_201  # of the draws, apart from other keys
POWERS, LEVELS = {"mu": 2, "nu": 4}, {"mu": 127, "nu": 255}


def kind_of(path: Any, leaf: Any) -> str | None:
  """Returns "mu" or "nu" where a leaf of an optimizer's state is a large moment, else None."""
  names = set(path_name(path).split("/")) & set(POWERS)
  return names.pop() if names and leaf.ndim and leaf.size >= WHOLE_BELOW else None


def in_fewer_bits(inner: optax.GradientTransformation, form: str) -> optax.GradientTransformation:
  """Keeps an optimizer's large moments as `form`, a name in `FORMS`, between steps; it computes in float32.

  Args:
    inner: the optimizer.
    form: "bfloat16" or "int8".

  Returns:
    The optimizer. Its state is `{"inner": …, "count": steps}`.

  Raises:
    ValueError: an unknown form; at `init`, the optimizer has no such moments.
  """
  if form not in FORMS:
    raise ValueError(f"config.optimizer.moments_dtype is {form!r}; known: {['float32', *FORMS]}")
  pack, unpack = FORMS[form]

  def packed(state: Any, count: jax.Array) -> Any:
    key = jax.random.fold_in(jax.random.key(KEY), count)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    kinds = [kind_of(path, leaf) for path, leaf in leaves]
    new = [
      leaf if kind is None else pack(kind, leaf, jax.random.fold_in(key, number))
      for number, (kind, (_, leaf)) in enumerate(zip(kinds, leaves, strict=True))
    ]
    return jax.tree.unflatten(tree, new)

  def init(params: Any) -> Any:
    state = inner.init(params)
    names = {name for path, _ in jax.tree_util.tree_leaves_with_path(state) for name in path_name(path).split("/")}
    if not names & set(POWERS):
      raise ValueError(
        f"config.optimizer.moments_dtype is {form!r}, but this optimizer has no moments to keep in it; set 'float32'"
      )
    return {"inner": packed(state, jnp.int32(0)), "count": jnp.int32(0)}

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    whole = jax.tree.map(unpack, state["inner"], is_leaf=_is_packed)
    updates, new = inner.update(grads, whole, params)
    return updates, {"inner": packed(new, state["count"] + 1), "count": state["count"] + 1}

  return optax.GradientTransformation(init, update)


def _is_packed(leaf: Any) -> bool:
  return isinstance(leaf, dict) and bool({"mu_codes", "nu_codes", "bfloat16"} & set(leaf))


def _layout(x: jax.Array) -> P:
  return jax.typeof(x).sharding.spec


def to_bfloat16(kind: str, x: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
  """Rounds float32 to one of the two nearest bfloat16, the nearer the likelier."""
  del kind

  def pack(x: jax.Array, key: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # carries into what is kept by its share
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)

  return {"bfloat16": in_auto(pack, _layout(x))(x, key)}


def from_bfloat16(leaf: Any) -> Any:
  """Returns float32 of what `to_bfloat16` made; other leaves as they are."""
  return leaf["bfloat16"].astype(jnp.float32) if _is_packed(leaf) else leaf


def block_of(size: int) -> int:
  """Returns the entries that share a scale along a dim of `size`: the largest divisor up to `BLOCK`.

  It does not depend on the mesh, so that a checkpoint loads on any.

  Example:
    >>> block_of(11008), block_of(96), block_of(1000)
    (128, 96, 125)
  """
  return next(block for block in range(min(BLOCK, size), 0, -1) if size % block == 0)


def to_int8(kind: str, x: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
  """Quantises a moment by blocks.

  Args:
    kind: "mu" or "nu".
    x: float32 [..., N].
    key: of the rounding.

  Returns:
    `{kind}_codes` of x's shape, int8 or uint8, and `scales` float32 [..., N / block].
  """
  layout = _layout(x)
  scales = P(*[None] * x.ndim) if spec() is None else P(*layout[:-1], None)  # few: whole along the last dim
  codes, scale = in_auto(partial(_quantise, kind), (layout, scales))(x, key)
  return {f"{kind}_codes": codes, "scales": scale}


def _quantise(kind: str, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  power, levels = POWERS[kind], LEVELS[kind]
  block = block_of(x.shape[-1])
  blocks = x.reshape(*x.shape[:-1], -1, block)
  scale = jnp.max(jnp.abs(blocks), axis=-1)
  share = jnp.abs(blocks) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[..., None]
  below = jnp.floor(jnp.clip(share ** (1 / power), 0.0, 1.0) * levels)
  low, high = (below / levels) ** power, ((below + 1) / levels) ** power
  up = jax.random.uniform(key, share.shape) * (high - low) < share - low
  code = jnp.minimum(below + up, levels)
  if kind == "nu":
    code = jnp.where(share > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8)
  else:
    code = (jnp.sign(blocks) * code).astype(jnp.int8)
  return code.reshape(x.shape), scale


def from_int8(leaf: Any) -> Any:
  """Returns float32 of what `to_int8` made; other leaves as they are."""
  if not _is_packed(leaf):
    return leaf
  kind = "nu" if "nu_codes" in leaf else "mu"
  codes, power, levels = leaf[f"{kind}_codes"], POWERS[kind], LEVELS[kind]

  def unpack(codes: jax.Array, scales: jax.Array) -> jax.Array:
    share = codes.astype(jnp.float32).reshape(*scales.shape, -1) / levels
    return (jnp.sign(share) * jnp.abs(share) ** power * scales[..., None]).reshape(codes.shape)

  return in_auto(unpack, _layout(codes))(codes, leaf["scales"])


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
  "bfloat16": (to_bfloat16, from_bfloat16),
  "int8": (to_int8, from_int8),
}


def offloaded(inner: optax.GradientTransformation, kind: str) -> optax.GradientTransformation:
  """Keeps an optimizer's arrays in the host's memory between steps; a step copies them to the devices and back.

  Args:
    inner: the optimizer.
    kind: "pinned_host".

  Raises:
    ValueError: another kind.
  """
  if kind != "pinned_host":
    raise ValueError(f"config.optimizer.offload is {kind!r}; known: ['', 'pinned_host']")

  def away(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if is_offloaded(x) else x, state)

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, new = inner.update(grads, on_device(state), params)
    return updates, away(new)

  return optax.GradientTransformation(lambda params: away(inner.init(params)), update)


def on_device(state: Any) -> Any:
  """Copies what lies in the host's memory to the devices, while tracing."""

  def here(x: Any) -> Any:
    away = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if away else x

  return jax.tree.map(here, state)


def kept_away(shapes: Any, kind: str) -> Any:
  """Gives shapes of an `offloaded` state, laid out, the memory that its arrays lie in between steps."""

  def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding.with_memory_kind(kind) if is_offloaded(leaf) else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, shapes)


def check_memory(kind: str, mesh: jax.sharding.Mesh) -> None:
  """Refuses a memory kind that the mesh's devices lack; "" is always there.

  Raises:
    ValueError: with the kinds that there are.
  """
  device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
  known = [memory.kind for memory in device.addressable_memories()]
  if kind and kind not in known:
    raise ValueError(f"config.optimizer.offload is {kind!r}; {device.device_kind} has {known}; set it to ''")


def is_offloaded(leaf: Any) -> bool:
  """Returns whether `offloaded` keeps an array of a state in the host's memory: all but counts."""
  return leaf.ndim > 0
