"""Attention for every use: packed training, encoder, cross, cached decoding.

One function computes it from what may be seen (segments, causality, bias); `ATTENTION` names its implementations. Axis
letters: see `models/model.py`. Query heads are stored as K groups of G, so grouped-query attention needs no repeat, and
a `tensor` axis splits K.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers import dense, normal, zeros
from models.sharding import BATCH, pin, spec

MASKED = -1e30  # finite, so that a row with nothing to see gives a mean of values and not NaN


class Visibility(NamedTuple):
  """Which keys a query may see: same segment, and (if causal) not later in the row.

  Attributes:
    query_segments_BT: int32; 0 is padding.
    key_segments_BS: int32; 0 is padding and never seen by a real token.
    causal: keys later than the query are hidden.
    offset: index in the row of the first query (cached decoding); keys are counted from 0.
    bidirectional_BT: int32 or None; where both ends are 1 (a prefix), causality does not apply.
    window: causal: only this many latest keys are seen, the query's own among them (a sliding window); 0 = all.
  """

  query_segments_BT: jax.Array
  key_segments_BS: jax.Array
  causal: bool
  offset: jax.Array | int = 0
  bidirectional_BT: jax.Array | None = None
  window: jax.Array | int = 0


def visible(view: Visibility) -> jax.Array:
  """Returns the boolean mask [B,T,S] that `view` describes."""
  mask_BTS = view.query_segments_BT[:, :, None] == view.key_segments_BS[:, None, :]
  if view.causal:
    index_T = jnp.arange(view.query_segments_BT.shape[1]) + view.offset
    distance_TS = index_T[:, None] - jnp.arange(view.key_segments_BS.shape[1])[None, :]
    causal_TS = distance_TS >= 0
    if not (isinstance(view.window, int) and view.window == 0):
      mask_BTS &= distance_TS < view.window
    if view.bidirectional_BT is None:
      return mask_BTS & causal_TS
    prefix_BT = view.bidirectional_BT == 1
    return mask_BTS & (causal_TS | (prefix_BT[:, :, None] & prefix_BT[:, None, :]))
  return mask_BTS


def xla_attention(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  view: Visibility,
  bias_KGTS: jax.Array | None,
  scale: float,
  cap: float = 0.0,
) -> jax.Array:
  """Softmax attention in plain XLA, logits and softmax in float32.

  Args:
    q_BTKGH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    view: what each query may see.
    bias_KGTS: float32 added to the logits (T5's relative bias), or None.
    scale: multiplies the logits (T5: 1).
    cap: the scaled logits become `cap · tanh(logits / cap)` (Gemma 2); 0 = no cap.

  Returns:
    [B,T,K,G,H] in the values' dtype.
  """
  logits_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  if cap:
    logits_BKGTS = cap * jnp.tanh(logits_BKGTS / cap)
  if bias_KGTS is not None:
    logits_BKGTS += bias_KGTS
  mask_BTS = visible(view)
  logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
  weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)


ATTENTION: dict[str, Callable[..., jax.Array]] = {"xla": xla_attention}


class Attention(nnx.Module):
  """Projections around `ATTENTION[name]`; self-attention, or cross-attention over given keys and values.

  `bias` says which projections have one: "none", "qkv" or "all". `norm` makes the norm over H of each query and key.
  """

  def __init__(
    self,
    rngs: nnx.Rngs,
    dim: int,
    kv_heads: int,
    groups: int,
    head_dim: int,
    stddevs: tuple[float, ...],
    bias: str = "none",
    norm: Callable[[int], nnx.Module] | None = None,
  ):
    into_query, into_kv, out_of = stddevs
    self.query = normal(rngs, (dim, kv_heads, groups, head_dim), into_query)
    self.key = normal(rngs, (dim, kv_heads, head_dim), into_kv)
    self.value = normal(rngs, (dim, kv_heads, head_dim), into_kv)
    self.out = normal(rngs, (kv_heads, groups, head_dim, dim), out_of)
    self.qkv_bias, self.bias, self.normed = bias in ("qkv", "all"), bias == "all", norm is not None
    if self.qkv_bias:
      self.query_bias = zeros((kv_heads, groups, head_dim))
      self.key_bias, self.value_bias = zeros((kv_heads, head_dim)), zeros((kv_heads, head_dim))
    if self.bias:
      self.out_bias = zeros((dim,))
    if norm is not None:
      self.query_norm, self.key_norm = norm(head_dim), norm(head_dim)

  def queries(self, x_BTD: jax.Array) -> jax.Array:
    """Projects to [B,T,K,G,H]."""
    dims = (BATCH, None, "tensor", None, None)
    q = dense("BTD,DKGH->BTKGH", x_BTD, self.query[...], (None, "tensor", None, None), dims)
    q = q + self.query_bias[...].astype(q.dtype) if self.qkv_bias else q
    return self.query_norm(q) if self.normed else q

  def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects to keys and values, each [B,S,K,H]."""
    dims = (BATCH, None, "tensor", None)
    k = dense("BSD,DKH->BSKH", x_BSD, self.key[...], (None, "tensor", None), dims)
    v = dense("BSD,DKH->BSKH", x_BSD, self.value[...], (None, "tensor", None), dims)
    if self.qkv_bias:
      k, v = k + self.key_bias[...].astype(k.dtype), v + self.value_bias[...].astype(v.dtype)
    return (self.key_norm(k) if self.normed else k), v

  def output(self, y_BTKGH: jax.Array) -> jax.Array:
    """Projects back to [B,T,D]."""
    y = dense("BTKGH,KGHD->BTD", y_BTKGH, self.out[...], ("tensor", None, None, None), (BATCH, None, None))
    return y + self.out_bias[...].astype(y.dtype) if self.bias else y


Rotation = tuple[jax.Array, jax.Array]  # cosine and sine of every angle, float32 [B,T,H/2]


def rotary_frequencies(head_dim: int, theta: float, scaling: tuple = ()) -> np.ndarray:
  """Returns the angle that each pair of dims turns by from one position to the next.

  Args:
    head_dim: H.
    theta: wavelength base.
    scaling: () or ("linear", factor) or ("llama3", factor, low factor, high factor, original length).

  Returns:
    float32 [H/2].

  Raises:
    ValueError: another scaling.

  Reference:
    Su et al. 2021; Chen et al. 2023 (linear); Llama 3.1's published `apply_scaling` (llama3).
  """
  frequency = theta ** (-np.arange(head_dim // 2, dtype=np.float32) / (head_dim // 2))
  kind, *numbers = scaling or ("none",)
  if (kind, len(numbers)) not in (("none", 0), ("linear", 1), ("llama3", 4)):
    raise ValueError(f"rope_scaling is {scaling}; known: (), ('linear', factor), ('llama3', factor, low, high, length)")
  if kind == "linear":
    frequency = frequency / np.float32(numbers[0])
  if kind == "llama3":
    factor, low, high, length = numbers
    wavelength = 2 * np.pi / frequency
    # Short waves stay, long ones are stretched, and between the two the share that is kept falls linearly.
    kept = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    frequency = kept * frequency + (1 - kept) * frequency / factor
  return frequency.astype(np.float32)


def rotation(positions_BT: jax.Array, frequency: np.ndarray) -> Rotation:
  """Returns the cosine and sine of every position's angles."""
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
  """Applies rotary position embedding over the last dim, halves paired as Llama does (Su et al. 2021).

  Args:
    x: [B,T,…,H].
    turn: from `rotation`.
  """
  cos, sin = (part.reshape(part.shape[:2] + (1,) * (x.ndim - 3) + part.shape[-1:]) for part in turn)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def relative_bucket(distance: jax.Array, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
  """Maps a distance to T5's bucket: near distances exactly, far ones by logarithm.

  Args:
    distance: int array, key index minus query index.
    bidirectional: half of the buckets for each direction (encoder); else keys to the right share bucket 0.
    buckets: number of buckets.
    max_distance: this distance and all beyond share the last bucket.

  Returns:
    int32 bucket of each distance.

  Reference:
    Raffel et al. 2020, §2.1; the vectors in `tests/test_attention.py`.
  """
  first = jnp.zeros_like(distance)
  if bidirectional:
    buckets //= 2
    first = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = buckets // 2
  # float32 throughout, as in the published models: at distance 16, 32, 64 rounding decides.
  ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / np.float32(np.log(max_distance / exact))
  far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
  return first + jnp.where(distance < exact, distance, far)


class RelativeBias(nnx.Module):
  """T5's relative position bias: one table shared by a stack's layers."""

  def __init__(self, rngs: nnx.Rngs, heads: int, bidirectional: bool, buckets: int, max_distance: int, stddev: float):
    self.table = normal(rngs, (buckets, heads, 1), stddev)
    self.bidirectional, self.buckets, self.max_distance = bidirectional, buckets, max_distance

  def __call__(self, queries: int, keys: int, offset: jax.Array | int = 0) -> jax.Array:
    """Returns the bias [K,G,T,S] in float32; within a segment, index distance is position distance."""
    index_T = jnp.arange(queries) + offset
    distance_TS = jnp.arange(keys)[None, :] - index_T[:, None]
    bucket_TS = relative_bucket(distance_TS, self.bidirectional, self.buckets, self.max_distance)
    table = pin(self.table[...], None, "tensor", None)
    # A one-hot product instead of a gather: its gradient is a product, too, and not a scatter.
    one_hot = jax.nn.one_hot(bucket_TS, self.buckets, dtype=jnp.float32)
    layout = spec("tensor", None, None, None)
    return jnp.einsum("TSE,EKG->KGTS", one_hot, table, precision="highest", out_sharding=layout)
