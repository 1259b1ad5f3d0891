"""Splash attention, JAX's Pallas kernel for TPUs: logits never leave the chip, and blocks that are hidden are skipped.

Rows lie over `data` and `fsdp`, key and value heads over `tensor`; each device runs the kernel on its own. Where rows
are split over `context`, it gathers keys and values and has the mask of its own queries. On a CPU
Pallas interprets it (slow: for tests). Axis letters: see `models/model.py`, and N query heads, K·G.

Reference:
  `jax.experimental.pallas.ops.tpu.splash_attention`; Dao et al. 2022 (arXiv 2205.14135).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import BATCH, CONTEXT, parts_of, per_device, pin, platform, split_over
from models.visibility import Bias, Drop, Visibility, hide_blind, refuse

LANES = 128  # the kernel's blocks are multiples of a TPU's lanes
# Queries and keys in a block. Of 2048 causal tokens 512 computes 62 % of the pairs, 1024 75 %, 256 56 % with four times
# the steps; the logits of a block and their gradients (1 MiB each) leave room in VMEM for reading ahead.
QUERY_BLOCK = KEY_BLOCK = 512
# Of the backward pass, which writes one dq for each block of keys and adds them up: half as many are worth its 75 %.
BACKWARD_KEY_BLOCK = 1024
# Up to here one kernel makes all gradients. Beyond, adding up its dq costs more than a second kernel that computes the
# logits again: of 4096 tokens 463 and 172 ms of llama2-7b's step, by the compiler's cycles for a v6e.
FUSED_KEYS = 2048
_NO_QUERY, _NO_KEY = -2, -1  # segments of what fills up the last block


def splash_attention(
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
  """Softmax attention by the splash kernel, forward and backward.

  Args:
    q_BTKGH, k_BSKH, v_BSKH, view, bias, scale, cap, drop: see `xla_attention`. `bias` and `drop` must be None, `view`
      without a prefix, with `offset` 0 and a window that is known while tracing.
    block: most queries and keys in a block, a multiple of `LANES`; 0 = `QUERY_BLOCK` and `KEY_BLOCK`.

  Returns:
    [B,T,K,G,H] in the queries' dtype; 0 for a query with nothing to see.

  Raises:
    ValueError: it is asked for what the kernel has not.
  """
  moving = not (isinstance(view.window, int) and isinstance(view.offset, int) and view.offset == 0)
  most = (block or QUERY_BLOCK, block or KEY_BLOCK)
  asked = {"bias": bias is not None, "bidirectional prefix": view.bidirectional_BT is not None}
  refuse("splash", **asked, **{"cache, or window that tracing does not know": moving, "dropout": drop is not None})
  axis, parts = split_over(q_BTKGH), parts_of(q_BTKGH)
  heads = (BATCH, axis, "tensor", None)
  # The kernel has no scale: queries carry it.
  q_BTKGH, k_BSKH, v_BSKH = pin(q_BTKGH * scale, *heads, None), pin(k_BSKH, *heads), pin(v_BSKH, *heads)
  segments = [pin(jnp.asarray(x), BATCH, axis) for x in (view.query_segments_BT, view.key_segments_BS)]
  split, rows = P(BATCH, axis, "tensor"), P(BATCH, axis)
  arrays, ins = (q_BTKGH, k_BSKH, v_BSKH, *segments), (split, split, split, rows, rows)
  if parts == 1:
    y_BTKGH = per_device(partial(_on_device, view.causal, int(view.window), cap, most), ins, split)(*arrays)
  else:
    kernel, layout = _kernel_of_parts(view.causal, int(view.window), cap, most, parts, q_BTKGH, k_BSKH)
    y_BTKGH = per_device(partial(_on_part, most), (layout, *ins), split)(kernel, *arrays)
  return hide_blind(y_BTKGH, view)


def _block(length: int, most: int) -> int:
  return min(most, -(-length // LANES) * LANES)


def _fill(x, size: int, filler: int = 0):
  """Fills axis 1 up to a multiple of `size`."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2), constant_values=filler)


def _on_device(causal: bool, window: int, cap: float, most: tuple[int, int], q_BTKGH, k_BSKH, *rest):
  queries, keys = q_BTKGH.shape[1], k_BSKH.shape[1]
  query_block, key_block = blocks = _block(queries, most[0]), _block(keys, most[1])
  shape = queries + -queries % query_block, keys + -keys % key_block
  kernel = _kernel(causal, window, cap, shape, blocks, q_BTKGH.shape[2] * q_BTKGH.shape[3])
  return _run(kernel, blocks, q_BTKGH, k_BSKH, *rest)


def _own_block(own: int, most: int) -> int:
  """Returns the largest block of queries that divides a part of a row."""
  return max(size for size in range(LANES, most + 1, LANES) if own % size == 0)


def _kernel_of_parts(causal: bool, window: int, cap: float, most: tuple[int, int], parts: int, q_BTKGH, k_BSKH):
  """Returns the kernel of all parts of a row, whose masks are arrays split over `context`, and their layout."""
  queries, keys, mesh = q_BTKGH.shape[1], k_BSKH.shape[1], jax.sharding.get_abstract_mesh()
  blocks = _own_block(queries // parts, most[0]), _block(keys, most[1])
  heads = q_BTKGH.shape[2] * q_BTKGH.shape[3] // mesh.shape["tensor"]
  kernel = _kernel(causal, window, cap, (queries, keys + -keys % blocks[1]), blocks, heads, parts)
  layout = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, CONTEXT)))
  return jax.tree.map(jax.sharding.reshard, kernel, layout), layout


def _on_part(most, kernel, q_BTKGH, k_BSKH, v_BSKH, query_segments_BT, key_segments_BS):
  gather = partial(jax.lax.all_gather, axis_name=CONTEXT, axis=1, tiled=True)
  k_BSKH, v_BSKH, key_segments_BS = gather(k_BSKH), gather(v_BSKH), gather(key_segments_BS)
  blocks = _own_block(q_BTKGH.shape[1], most[0]), _block(k_BSKH.shape[1], most[1])
  return _run(kernel, blocks, q_BTKGH, k_BSKH, v_BSKH, query_segments_BT, key_segments_BS)


def _run(kernel, blocks: tuple[int, int], q_BTKGH, k_BSKH, v_BSKH, query_segments_BT, key_segments_BS):
  rows, queries, kv_heads, groups, head_dim = q_BTKGH.shape
  query_block, key_block = blocks
  q_BNTH = _fill(q_BTKGH, query_block).reshape((rows, -1, kv_heads * groups, head_dim)).swapaxes(1, 2)
  k_BKSH, v_BKSH = (_fill(x, key_block).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
  segments = kernels.SegmentIds(
    _fill(query_segments_BT, query_block, _NO_QUERY), _fill(key_segments_BS, key_block, _NO_KEY)
  )
  y_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
  return y_BNTH.swapaxes(1, 2)[:, :queries].reshape(q_BTKGH.shape)


def _kernel(
  causal: bool, window: int, cap: float, shape: tuple[int, int], blocks: tuple[int, int], heads: int, parts: int = 1
):
  mask = masks.FullMask(shape)
  if causal:
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  query, key = blocks
  backward = BACKWARD_KEY_BLOCK if shape[1] % BACKWARD_KEY_BLOCK == BACKWARD_KEY_BLOCK % key == 0 else key
  fused = shape[1] <= FUSED_KEYS
  sizes = kernels.BlockSizes(
    block_q=query,
    block_kv=key,
    block_q_dkv=query,
    block_kv_dkv=backward,
    block_kv_dkv_compute=key,
    block_q_dq=None if fused else query,
    block_kv_dq=None if fused else key,
    use_fused_bwd_kernel=fused,
  )
  return kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    attn_logits_soft_cap=cap or None,
    head_shards=1,
    residual_checkpoint_name="attention",
    q_seq_shards=parts,
    interpret=platform() == "cpu",
  )
