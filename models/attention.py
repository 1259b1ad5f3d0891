"""Attention for every use: packed training, encoder, cross, cached decoding.

One function computes it from what may be seen (segments, causality, bias); `ATTENTION` names its implementations, and
`choose` says which one a call takes. Axis letters: see `models/model.py`. Query heads are stored as K groups of G, so
grouped-query attention needs no repeat, and a `tensor` axis splits K.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.blockwise import block_distances, block_length, blockwise_attention, skew
from models.cudnn import cudnn_attention
from models.layers import add_bias, dense, dropout, normal, zeros
from models.sharding import BATCH, CONTEXT, pin, platform, spec, split_over
from models.splash import LANES, splash_attention
from models.visibility import MASKED, Bias, Drop, Visibility, visible, whole_rows


def xla_attention(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  view: Visibility,
  bias: Bias | None,
  scale: float,
  cap: float = 0.0,
  drop: Drop | None = None,
) -> jax.Array:
  """Softmax attention in plain XLA, logits and softmax in float32.

  Args:
    q_BTKGH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    view: what each query may see.
    bias: added to the logits (T5's relative bias), or None.
    scale: multiplies the logits (T5: 1).
    cap: the scaled logits become `cap · tanh(logits / cap)` (Gemma 2); 0 = no cap.
    drop: dropout on the weights (T5, GPT-2), or None.

  Returns:
    [B,T,K,G,H] in the values' dtype.
  """
  k_BSKH, v_BSKH = (whole_rows(x, "tensor", None) for x in (k_BSKH, v_BSKH))
  logits_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  if cap:
    logits_BKGTS = cap * jnp.tanh(logits_BKGTS / cap)
  if bias is not None:
    logits_BKGTS += bias.whole_KGTS
  mask_BTS = visible(view)
  logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
  weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
  if drop is not None:
    weights_BKGTS = dropout(weights_BKGTS, drop.rate, drop.key, (BATCH, "tensor", None, split_over(q_BTKGH), None))
  return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH), "attention")


ATTENTION: dict[str, Callable[..., jax.Array]] = {
  "xla": xla_attention,
  "blockwise": blockwise_attention,
  "splash": splash_attention,
  "cudnn": cudnn_attention,
}
CACHED = "xla"  # the path of decoding with a cache, whatever the config names: few queries, so few logits
FIXED_WINDOW = frozenset({"splash"})  # paths that must know a window while tracing
BLOCKED = frozenset({"blockwise", "splash"})  # paths in blocks, whose size `config.model.attention_block` may set


def path_of(name: str, block: int) -> Callable[..., jax.Array]:
  """Returns `ATTENTION[name]` with blocks of so many queries and keys, where it has blocks; 0 = its own choice."""
  return partial(ATTENTION[name], block=block) if block and name in BLOCKED else ATTENTION[name]


# Rows of this many tokens and more "auto" gives to "blockwise" where no kernel can. On a CPU it is several times as
# fast and takes a fifth of the memory (measured, alone; off a T5's step of 512 tokens it takes a sixth). On a TPU it is
# for the memory: 3.9 for 6.9 GiB at 4 rows of 2048 tokens, in 1.4 times the time by the compiler's estimates. A GPU was
# not measured.
BLOCKWISE_FROM = {"cpu": 512, "tpu": 2048, "gpu": 2048}


class Call(NamedTuple):
  """What is asked of an attention path, as far as paths differ.

  Attributes:
    queries, keys: T and S.
    head_dim: H.
    dtype: of queries, keys and values.
    bias: T5's relative bias. prefix: a bidirectional prefix. cap: a soft cap. dropout: on the weights.
    parts: in how many the queries (and keys) of a row lie, the size of mesh axis `context`.
    block: queries and keys in a block; 0 = the path's choice, or no blocks.
  """

  queries: int
  keys: int
  head_dim: int
  dtype: str
  bias: bool = False
  prefix: bool = False
  cap: bool = False
  dropout: bool = False
  parts: int = 1
  block: int = 0


def _no_blocks(call: Call) -> str:
  return f"has no blocks, and config.model.attention_block is {call.block}" if call.block else ""


def _blockwise_lacks(call: Call, where: str) -> str:
  own = call.queries // call.parts
  size = block_length(own, call.block)
  if call.bias and call.parts > 1 and own % size:
    multiple = size * call.parts
    return f"needs rows of a multiple of {multiple} tokens with a relative bias and a context of {call.parts}"
  return "has no dropout on attention weights" if call.dropout else ""


def _splash_lacks(call: Call, where: str) -> str:
  if where == "gpu":
    return "runs on TPUs (and, interpreted, on CPUs)"
  if call.bias or call.prefix:
    return "has no relative bias" if call.bias else "has no bidirectional prefix"
  if call.block % LANES:
    return f"needs a config.model.attention_block of a multiple of {LANES}, not {call.block}"
  if call.parts > 1 and call.queries % (LANES * call.parts):
    return f"needs rows of a multiple of {LANES * call.parts} tokens with a context of {call.parts}"
  return _blockwise_lacks(call, where)


def _cudnn_lacks(call: Call, where: str) -> str:
  if where != "gpu":
    return "runs on GPUs"
  if call.bias or call.cap or call.dropout:
    return "has no relative bias" if call.bias else "has no soft cap" if call.cap else _blockwise_lacks(call, where)
  if call.dtype not in ("bfloat16", "float16"):
    return f"computes in bfloat16 or float16, not {call.dtype}"
  if call.head_dim > 256 or call.head_dim % 8 or call.queries % 2 or call.keys % 2:
    return f"needs even lengths and a head_dim of 8, 16, … 256, not {call.queries}, {call.keys} and {call.head_dim}"
  return _no_blocks(call)


# Why a path cannot do what is asked on a platform; "" = it can.
UNABLE: dict[str, Callable[[Call, str], str]] = {
  "xla": lambda call, where: _no_blocks(call),
  "blockwise": _blockwise_lacks,
  "splash": _splash_lacks,
  "cudnn": _cudnn_lacks,
}


def choose(name: str, call: Call, where: str | None = None) -> str:
  """Returns the path that a call takes.

  Args:
    name: a name in `ATTENTION`, or "auto".
    call: what is asked.
    where: "cpu", "gpu" or "tpu"; None = where the program that is being traced will run.

  Returns:
    `name` itself, or what "auto" picks: splash on a TPU where it can, else xla up to `BLOCKWISE_FROM` tokens and
    blockwise beyond. Never cudnn, which has not been run by this project's tests.

  Raises:
    ValueError: an unknown name, or one that cannot do what is asked here.
  """
  where = platform() if where is None else where
  if call.block < 0 or call.block % 8:
    raise ValueError(f"config.model.attention_block must be 0 or a multiple of 8, got {call.block}")
  if name == "auto":
    if where == "tpu" and not UNABLE["splash"](call, where):
      return "splash"
    long = max(call.queries, call.keys) >= BLOCKWISE_FROM[where]
    lacks = UNABLE["blockwise"](call, where)
    if lacks and call.block:
      raise ValueError(f"config.model.attention_block is {call.block}, and no path in blocks can: blockwise {lacks}")
    return "blockwise" if (long or call.block) and not lacks else "xla"
  if name not in ATTENTION:
    raise ValueError(f"config.model.attention is {name!r}; known: {['auto', *sorted(ATTENTION)]}")
  lacks = UNABLE[name](call, where)
  if lacks:
    able = ["auto", *(other for other in ATTENTION if not UNABLE[other](call, where))]
    raise ValueError(f"config.model.attention is {name!r}, which {lacks}; this call can take {able}, here ({where})")
  return name


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns what goes into attention, under the names by which remat saves it (`SAVED` in models/layers.py)."""
  return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


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
    dims = (BATCH, split_over(x_BTD), "tensor", None, None)
    q = dense("BTD,DKGH->BTKGH", x_BTD, self.query[...], (None, "tensor", None, None), dims)
    q = add_bias(q, self.query_bias[...]) if self.qkv_bias else q
    return self.query_norm(q) if self.normed else q

  def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects to keys and values, each [B,S,K,H]."""
    dims = (BATCH, split_over(x_BSD), "tensor", None)
    k = dense("BSD,DKH->BSKH", x_BSD, self.key[...], (None, "tensor", None), dims)
    v = dense("BSD,DKH->BSKH", x_BSD, self.value[...], (None, "tensor", None), dims)
    if self.qkv_bias:
      k, v = add_bias(k, self.key_bias[...]), add_bias(v, self.value_bias[...])
    return (self.key_norm(k) if self.normed else k), v

  def output(self, y_BTKGH: jax.Array) -> jax.Array:
    """Projects back to [B,T,D]."""
    dims = (BATCH, split_over(y_BTKGH), None)
    y = dense("BTKGH,KGHD->BTD", y_BTKGH, self.out[...], ("tensor", None, None, None), dims)
    return checkpoint_name(add_bias(y, self.out_bias[...]) if self.bias else y, "out")


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
  parts = (jnp.concatenate([part, part], axis=-1) for part in turn)
  cos, sin = (part.reshape(part.shape[:2] + (1,) * (x.ndim - 3) + part.shape[-1:]) for part in parts)
  # By the compiler's cycles for a v6e, halves of 64 lanes take three times as long as this product, which is as exact.
  by_product = platform() == "tpu" and x.dtype == jnp.bfloat16 and x.shape[-1] // 2 % LANES != 0
  turned = (turned_by_product if by_product else turned_by_halves)(x)
  return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def turned_by_halves(x: jax.Array) -> jax.Array:
  """Turns each pair by 90 degrees: halves (a, b) of the last dim become (-b, a)."""
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([-second, first], axis=-1)


def turned_by_product(x: jax.Array) -> jax.Array:
  """`turned_by_halves` as a matrix product."""
  quarter_HH = np.kron([[0, 1], [-1, 0]], np.eye(x.shape[-1] // 2))
  return jnp.matmul(x, jnp.asarray(quarter_HH, x.dtype))


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

  def __init__(
    self,
    rngs: nnx.Rngs,
    heads: int,
    bidirectional: bool,
    buckets: int,
    max_distance: int,
    stddev: float,
    block: int = 0,
  ):
    self.table = normal(rngs, (buckets, heads, 1), stddev)
    self.bidirectional, self.buckets, self.max_distance, self.block = bidirectional, buckets, max_distance, block

  def __call__(self, queries: int, keys: int, offset: jax.Array | int = 0, parts: int = 1) -> Bias:
    """Returns the bias in float32, of queries in `parts`; within a segment, index distance is position distance."""
    index_T = jnp.arange(queries) + offset
    distance_TS = jnp.arange(keys)[None, :] - index_T[:, None]
    whole_KGTS = self._of(pin(distance_TS, CONTEXT, None) if parts > 1 else distance_TS, CONTEXT if parts > 1 else None)
    if not isinstance(offset, int) or offset or queries != keys:
      return Bias(whole_KGTS, None)
    distances = block_distances(queries // parts, queries, self.max_distance, self.block)
    return Bias(whole_KGTS, skew(self._of(jnp.asarray(distances))))

  def _of(self, distance_TS: jax.Array, axis: str | None = None) -> jax.Array:
    bucket_TS = relative_bucket(distance_TS, self.bidirectional, self.buckets, self.max_distance)
    table = pin(self.table[...], None, "tensor", None)
    # A one-hot product instead of a gather: its gradient is a product, too, and not a scatter.
    one_hot = jax.nn.one_hot(bucket_TS, self.buckets, dtype=jnp.float32)
    layout = spec("tensor", None, axis, None)
    return jnp.einsum("TSE,EKG->KGTS", one_hot, table, precision="highest", out_sharding=layout)
