"""Attention in blocks of queries and keys with a running softmax, in plain XLA, on any platform.

The logits of one pair of blocks exist at a time, forward and backward: memory grows with the row's length, not with its
square. Pairs that causality or a window hide are left out while tracing. T5's relative bias comes as a few blocks
(`Bias`), and so does its gradient. Where a row is split over `context`, a device keeps its own queries, gathers the
row's keys and values, forward and backward, and runs through its own list of pairs.

Axis letters: see `models/model.py`, and I query blocks, J key blocks, Q queries and C keys in a block, W distances of
blocks.

Reference:
  Rabe & Staats 2021 (arXiv 2112.05682); Dao 2023 (arXiv 2307.08691), §3.1, for the two passes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.sharding import BATCH, CONTEXT, parts_of, per_device, pin, spec, split_over
from models.visibility import MASKED, Bias, Drop, Visibility, refuse, visible

# Queries and keys in a block. On a CPU 256 beats 512 (measured). On a v5e chip it does by the compiler's figures for
# attention alone, most where there is a bias (4 rows of 2048 tokens: 5 against 13 ms); in a whole step of llama2-7b,
# which has none, 512 does (597 against 696 ms), but there the kernel of `models/splash.py` is to be had.
BLOCK = 256
_NO_QUERY, _NO_KEY = -2, -1  # segments of what fills up the last block: see nothing, and are seen by nothing


class Plan(NamedTuple):
  """What is known while tracing.

  Attributes:
    scale, cap: see `xla_attention`.
    causal: see `Visibility`.
    sizes: queries and keys in a block.
    pairs: for each part of a row (over `context`), (its query block, key block) of all that may hold something visible,
      in the order of query blocks; lists of one length, for every device runs the same program.
    on_mesh: whether arrays are split over explicit mesh axes.
  """

  scale: float
  cap: float
  causal: bool
  sizes: tuple[int, int]
  pairs: tuple[tuple[tuple[int, int], ...], ...]
  on_mesh: bool

  @property
  def split(self) -> bool:
    """Whether rows are split over `context`."""
    return len(self.pairs) > 1


class Marks(NamedTuple):
  """`Visibility`'s arrays: segments and prefixes of queries and keys, [B,T] and [B,S], and the window (or None)."""

  query_segments: jax.Array
  key_segments: jax.Array
  query_prefix: jax.Array | None
  key_prefix: jax.Array | None
  window: jax.Array | None


def block_length(length: int, block: int = 0) -> int:
  """Returns how many of `length` queries or keys are in a block: `block` or `BLOCK`, or all (to a multiple of 8)."""
  return min(block or BLOCK, -(-length // 8) * 8)


def block_distances(own: int, length: int, far: int, block: int = 0) -> np.ndarray:
  """Returns the distances (key index minus query index) that each of a bias's blocks holds, see `Bias`.

  Args:
    own: queries of one part of a row; it sets the size of blocks.
    length: queries, and keys.
    far: all distances of this and more, in either direction, are alike.
    block: see `blockwise_attention`.

  Returns:
    int32 [W, 2·block - 1], from a block's lower left corner to its upper right one; to be made blocks by `skew`.
  """
  size = block_length(own, block)
  most = min((max(far, 2) - 2) // size + 2, -(-length // size) - 1)
  return np.arange(-most, most + 1, dtype=np.int32)[:, None] * size + np.arange(1 - size, size, dtype=np.int32)


def skew(diagonals_KGWR: jax.Array) -> jax.Array:
  """Makes blocks [K,G,W,Q,C] of their diagonals [K,G,W,Q+C-1], where Q = C.

  By reshapes, for their gradients are reshapes, too, and a gather's a scatter: rows of one entry too many, read as rows
  without it, each begin one later than the row before.
  """
  count = diagonals_KGWR.shape[-1]
  size, lead = (count + 1) // 2, diagonals_KGWR.shape[:3]
  layout = spec("tensor", None, None, None)
  x = jnp.pad(diagonals_KGWR, ((0, 0), (0, 0), (0, 0), (0, 1)))
  x = jnp.broadcast_to(x[:, :, :, None], (*lead, size, count + 1))
  x = jax.lax.reshape(x, (*lead, size * (count + 1)), out_sharding=layout)[..., : size * count]
  x = jax.lax.reshape(x, (*lead, size, count), out_sharding=spec("tensor", None, None, None, None))
  return x[..., size - 1 :]


def blockwise_attention(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  view: Visibility,
  bias: Bias | None,
  scale: float,
  cap: float = 0.0,
  drop: Drop | None = None,
  block: int = 0,
) -> jax.Array:
  """Softmax attention whose logits exist for one pair of blocks at a time.

  Args:
    q_BTKGH, k_BSKH, v_BSKH, view, bias, scale, cap, drop: see `xla_attention`; `view.offset` must be 0, `drop` None.
    block: most queries and keys in a block, those that the bias's blocks were made with; 0 = `BLOCK`.

  Returns:
    [B,T,K,G,H] in the values' dtype; 0 for a query with nothing to see.

  Raises:
    ValueError: it is asked for a cache or dropout.
  """
  cached = not (isinstance(view.offset, int) and view.offset == 0)
  refuse("blockwise", cache=cached or (bias is not None and bias.blocks_KGWQC is None), dropout=drop is not None)
  parts, axis = parts_of(q_BTKGH), split_over(q_BTKGH)
  sizes = block_length(q_BTKGH.shape[1] // parts, block), block_length(k_BSKH.shape[1] // parts, block)
  pairs = _pairs(view, q_BTKGH.shape[1] // parts, k_BSKH.shape[1], parts, *sizes)
  plan = Plan(scale, cap, view.causal, sizes, pairs, spec() is not None)
  keys_prefix = view.bidirectional_BT if view.bidirectional_BS is None else view.bidirectional_BS
  no_window = isinstance(view.window, int) and view.window == 0
  marks = Marks(
    *(pin(jnp.asarray(x), BATCH, axis) for x in (view.query_segments_BT, view.key_segments_BS)),
    *(None if x is None else pin(jnp.asarray(x), BATCH, axis) for x in (view.bidirectional_BT, keys_prefix)),
    None if no_window else jnp.asarray(view.window, jnp.int32),
  )
  heads = (BATCH, axis, "tensor", None)
  q_BTKGH, k_BSKH, v_BSKH = pin(q_BTKGH, *heads, None), pin(k_BSKH, *heads), pin(v_BSKH, *heads)
  return _attend(plan, q_BTKGH, k_BSKH, v_BSKH, None if bias is None else bias.blocks_KGWQC, marks)


def _pairs(view: Visibility, own: int, keys: int, parts: int, query_block: int, key_block: int):
  """Returns `Plan.pairs` for queries in parts of `own`; a part with fewer pairs gets some that are hidden, too."""

  def hidden(part: int, i: int, j: int) -> bool:
    first = part * own + i * query_block
    nearest, furthest = first - (j + 1) * key_block + 1, first + query_block - 1 - j * key_block
    ahead = view.causal and view.bidirectional_BT is None and furthest < 0
    behind = view.causal and isinstance(view.window, int) and 0 < view.window <= nearest
    return ahead or behind

  every = [(i, j) for i in range(-(-own // query_block)) for j in range(-(-keys // key_block))]
  most = max(sum(not hidden(part, *pair) for pair in every) for part in range(parts))
  return tuple(tuple(sorted(every, key=lambda pair: hidden(part, *pair))[:most]) for part in range(parts))


_BIAS = P("tensor")


def _specs(plan: Plan) -> tuple[P, P, Marks]:
  """Layouts of queries, keys and values; of statistics; of marks."""
  axis = CONTEXT if plan.split else None
  return P(BATCH, axis, "tensor"), P(axis, BATCH, "tensor"), Marks(*[P(BATCH, axis)] * 4, P())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_BTKGH, k_BSKH, v_BSKH, blocks_KGWQC, marks):
  return _forward(plan, q_BTKGH, k_BSKH, v_BSKH, blocks_KGWQC, marks)[0]


def _forward(plan, q, k, v, blocks, marks):
  heads, statistics, of_marks = _specs(plan)
  ins = (heads, heads, heads, _BIAS, of_marks)
  y, log_z = per_device(partial(_forward_pairs, plan), ins, (heads, statistics))(q, k, v, blocks, marks)
  y, log_z = checkpoint_name(y, "attention"), checkpoint_name(log_z, "attention")
  return y, (q, k, v, blocks, marks, y, log_z)


def _backward(plan, kept, dy):
  heads, statistics, of_marks = _specs(plan)
  ins = (heads, heads, heads, _BIAS, of_marks, heads, statistics, heads)
  outs = (heads, heads, heads, None if kept[3] is None else _BIAS)
  dq, dk, dv, dblocks = per_device(partial(_backward_pairs, plan), ins, outs)(*kept, dy)
  return dq, dk, dv, dblocks, None


_attend.defvjp(_forward, _backward)


def _cut(x_BT, size: int, filler: int = 0):
  """[B,T,…] to [I,B,Q,…], the last block filled up."""
  x = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % size)) + ((0, 0),) * (x_BT.ndim - 2), constant_values=filler)
  return jnp.moveaxis(x.reshape((x.shape[0], -1, size) + x.shape[2:]), 1, 0)


def _cut_marks(plan: Plan, marks: Marks) -> Marks:
  query, key = plan.sizes
  return Marks(
    _cut(marks.query_segments, query, _NO_QUERY),
    _cut(marks.key_segments, key, _NO_KEY),
    None if marks.query_prefix is None else _cut(marks.query_prefix, query),
    None if marks.key_prefix is None else _cut(marks.key_prefix, key),
    marks.window,
  )


def _query_blocks(plan: Plan, x_BTKGH):
  return jnp.moveaxis(_cut(x_BTKGH, plan.sizes[0]), 2, 4)  # IBKGQH


def _key_blocks(plan: Plan, x_BSKH):
  return jnp.moveaxis(_cut(x_BSKH, plan.sizes[1]), 2, 3)  # JBKCH


def _joined(x, at: int, length: int):
  """Blocks, with the index in a block on axis `at`, back to [B,T,…]."""
  x = jnp.moveaxis(jnp.moveaxis(x, at, 2), 0, 1)
  return x.reshape((x.shape[0], -1) + x.shape[3:])[:, :length]


def _whole_keys(plan: Plan, k_BSKH, v_BSKH, marks: Marks):
  """Gathers what a device holds of a row's keys, values and their marks over `context`."""
  if not plan.split:
    return k_BSKH, v_BSKH, marks
  gather = partial(jax.lax.all_gather, axis_name=CONTEXT, axis=1, tiled=True)
  prefix = None if marks.key_prefix is None else gather(marks.key_prefix)
  return gather(k_BSKH), gather(v_BSKH), marks._replace(key_segments=gather(marks.key_segments), key_prefix=prefix)


def _own_pairs(plan: Plan, own: int):
  """Returns this device's pairs, [pairs,2], and the index in the row of the first of its `own` queries."""
  if not plan.split:
    return jnp.array(plan.pairs[0], jnp.int32), 0
  part = jax.lax.axis_index(CONTEXT)
  return jnp.array(plan.pairs, jnp.int32)[part], part * own


def _pair_logits(plan, q_BKGQH, k_BKCH, blocks_KGWQC, marks, i, j, start):
  """Logits [B,K,G,Q,C] of a pair of blocks (cut `marks`), capped, biased and masked; and shares of the cap."""
  logits = plan.scale * jnp.einsum("BKGQH,BKCH->BKGQC", q_BKGQH, k_BKCH, preferred_element_type=jnp.float32)
  capped = jnp.tanh(logits / plan.cap) if plan.cap else None
  logits = plan.cap * capped if plan.cap else logits
  if blocks_KGWQC is not None:
    logits += jax.lax.dynamic_index_in_dim(blocks_KGWQC, _distance(plan, blocks_KGWQC, i, j, start), 2, keepdims=False)
  first = start + i * q_BKGQH.shape[3] - j * k_BKCH.shape[2]
  segments = marks.query_segments[i], marks.key_segments[j]
  prefix = (None, None) if marks.query_prefix is None else (marks.query_prefix[i], marks.key_prefix[j])
  window = 0 if marks.window is None else marks.window
  mask_BQC = visible(Visibility(*segments, plan.causal, first, prefix[0], window, prefix[1]))
  return jnp.where(mask_BQC[:, None, None], logits, MASKED), capped


def _distance(plan, blocks_KGWQC, i, j, start):
  most = blocks_KGWQC.shape[2] // 2
  return jnp.clip(j - i - start // plan.sizes[0], -most, most) + most


def _forward_pairs(plan, q_BTKGH, k_BSKH, v_BSKH, blocks_KGWQC, marks):
  pairs, start = _own_pairs(plan, q_BTKGH.shape[1])
  k_BSKH, v_BSKH, marks = _whole_keys(plan, k_BSKH, v_BSKH, marks)
  q_IBKGQH, k_JBKCH, v_JBKCH = _query_blocks(plan, q_BTKGH), _key_blocks(plan, k_BSKH), _key_blocks(plan, v_BSKH)
  marks = _cut_marks(plan, marks)

  def body(carry, pair):
    top, total, sums = carry
    i, j = pair
    logits, _ = _pair_logits(plan, q_IBKGQH[i], k_JBKCH[j], blocks_KGWQC, marks, i, j, start)
    new_top = jnp.maximum(top[i], jnp.max(logits, axis=-1))
    kept, weights = jnp.exp(top[i] - new_top), jnp.exp(logits - new_top[..., None])
    values = jnp.einsum(
      "BKGQC,BKCH->BKGQH", weights.astype(v_BSKH.dtype), v_JBKCH[j], preferred_element_type=jnp.float32
    )
    total = total.at[i].set(kept * total[i] + jnp.sum(weights, axis=-1))
    sums = sums.at[i].set(kept[..., None] * sums[i] + values)
    return (top.at[i].set(new_top), total, sums), None

  zeros = jnp.zeros(q_IBKGQH.shape, jnp.float32)
  carry = (jnp.full_like(zeros[..., 0], MASKED), zeros[..., 0], zeros)
  (top, total, sums), _ = jax.lax.scan(body, carry, pairs)
  # A query that sees nothing has the weights 1 of hidden keys so far: it gets 0, and weights of 0 backward.
  sees = top > MASKED / 2
  y = jnp.where(sees[..., None], sums / jnp.where(sees, total, 1.0)[..., None], 0.0)
  log_z = jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1.0)), 0.0)
  return _joined(y, 4, q_BTKGH.shape[1]).astype(v_BSKH.dtype), log_z


def _backward_pairs(plan, q_BTKGH, k_BSKH, v_BSKH, blocks_KGWQC, marks, y_BTKGH, log_z_IBKGQ, dy_BTKGH):
  pairs, start = _own_pairs(plan, q_BTKGH.shape[1])
  k_BSKH, v_BSKH, marks = _whole_keys(plan, k_BSKH, v_BSKH, marks)
  q_IBKGQH, dy_IBKGQH = _query_blocks(plan, q_BTKGH), _query_blocks(plan, dy_BTKGH)
  k_JBKCH, v_JBKCH, marks = _key_blocks(plan, k_BSKH), _key_blocks(plan, v_BSKH), _cut_marks(plan, marks)
  mean_BTKG = jnp.sum(y_BTKGH.astype(jnp.float32) * dy_BTKGH.astype(jnp.float32), axis=-1)
  mean_IBKGQ = _query_blocks(plan, mean_BTKG[..., None])[..., 0]
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)

  def body(carry, pair):
    dq, dk, dv, dblocks = carry
    i, j = pair
    q, k, v, dy = q_IBKGQH[i], k_JBKCH[j], v_JBKCH[j], dy_IBKGQH[i]
    logits, capped = _pair_logits(plan, q, k, blocks_KGWQC, marks, i, j, start)
    weights = jnp.exp(logits - log_z_IBKGQ[i][..., None])
    dv = dv.at[j].add(product("BKGQC,BKGQH->BKCH", weights.astype(dy.dtype), dy))
    dlogits = weights * (product("BKGQH,BKCH->BKGQC", dy, v) - mean_IBKGQ[i][..., None])
    if dblocks is not None:
      dblocks = dblocks.at[:, :, _distance(plan, dblocks, i, j, start)].add(jnp.sum(dlogits, axis=0))
    dlogits = dlogits * (1.0 - jnp.square(capped)) if plan.cap else dlogits
    dlogits = (plan.scale * dlogits).astype(q.dtype)
    dq = dq.at[i].add(product("BKGQC,BKCH->BKGQH", dlogits, k))
    dk = dk.at[j].add(product("BKGQC,BKGQH->BKCH", dlogits, q))
    return (dq, dk, dv, dblocks), None

  dblocks = None if blocks_KGWQC is None else jnp.zeros_like(blocks_KGWQC)
  carry = (*(jnp.zeros(x.shape, jnp.float32) for x in (q_IBKGQH, k_JBKCH, v_JBKCH)), dblocks)
  (dq, dk, dv, dblocks), _ = jax.lax.scan(body, carry, pairs)
  if dblocks is not None and plan.on_mesh:
    dblocks = jax.lax.psum(dblocks, (*BATCH, CONTEXT) if plan.split else BATCH)
  dq, dk, dv = _joined(dq, 4, q_BTKGH.shape[1]), _joined(dk, 3, k_BSKH.shape[1]), _joined(dv, 3, k_BSKH.shape[1])
  if plan.split:  # each device has shares of all keys' gradients: their sums go to where the keys are
    dk, dv = (jax.lax.psum_scatter(x, CONTEXT, scatter_dimension=1, tiled=True) for x in (dk, dv))
  return dq.astype(q_BTKGH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype), dblocks
