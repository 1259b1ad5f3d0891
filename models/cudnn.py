"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Causality and a window are cuDNN's own, so that it skips what they hide; segments and prefixes become one boolean mask
[B,1,T,S] for all heads, which JAX hands over as an additive one in the compute dtype. (cuDNN's packed layout by offsets
is not in JAX's public function.) Axis letters: see `models/model.py`, and N query heads, K·G.

Reference:
  `jax.nn.dot_product_attention`.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.sharding import BATCH, CONTEXT, per_device, pin, split_over
from models.visibility import Bias, Drop, Visibility, hide_blind, refuse, visible


def cudnn_attention(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  view: Visibility,
  bias: Bias | None,
  scale: float,
  cap: float = 0.0,
  drop: Drop | None = None,
  implementation: str = "cudnn",
) -> jax.Array:
  """Softmax attention by cuDNN.

  Args:
    q_BTKGH, k_BSKH, v_BSKH, view, bias, scale, cap, drop: see `xla_attention`. `bias` and `drop` must be None, `cap` 0.
    implementation: of `jax.nn.dot_product_attention`; "xla" computes the same from the same arguments anywhere.

  Returns:
    [B,T,K,G,H] in the values' dtype; 0 for a query with nothing to see.

  Raises:
    ValueError: it is asked for what cuDNN has not.
  """
  refuse("cudnn", bias=bias is not None, cap=cap != 0, dropout=drop is not None)
  axis = split_over(q_BTKGH)
  # cuDNN's own causality has no exception for a prefix, and counts from the first query that a device holds.
  causal = view.causal and view.bidirectional_BT is None and axis is None
  fixed = isinstance(view.window, int)
  # What cuDNN hides by itself need not stand in the mask: a window must be known while tracing for that.
  rest = view._replace(causal=False) if causal and fixed else view
  mask_B1TS = pin(visible(rest)[:, None], BATCH, None, axis, None)
  heads = (BATCH, axis, "tensor", None)
  q_BTKGH, k_BSKH, v_BSKH = pin(q_BTKGH, *heads, None), pin(k_BSKH, *heads), pin(v_BSKH, *heads)
  run = partial(
    jax.nn.dot_product_attention,
    scale=scale,
    is_causal=causal,
    local_window_size=(view.window - 1, 0) if causal and fixed and view.window else None,
    implementation=implementation,
  )

  def on_device(q, k, v, mask):
    if axis is not None:
      k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
    q_BTNH = q.reshape(q.shape[:2] + (-1, q.shape[-1]))
    return run(q_BTNH, k, v, mask=mask).reshape(q.shape)

  split = P(BATCH, axis, "tensor")
  y_BTKGH = per_device(on_device, (split, split, split, P(BATCH, None, axis)), split)(
    q_BTKGH, k_BSKH, v_BSKH, mask_B1TS
  )
  return checkpoint_name(hide_blind(y_BTKGH, view), "attention")
