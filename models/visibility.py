"""What attention is computed from besides queries, keys and values: who may see whom, and what is added to the logits.

Every path in `models/attention.py` `ATTENTION` takes these. Axis letters: see `models/model.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import BATCH, pin, split_over

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
    bidirectional_BS: int32, the keys' own, where keys and queries are not the same tokens; None = `bidirectional_BT`.
  """

  query_segments_BT: jax.Array
  key_segments_BS: jax.Array
  causal: bool
  offset: jax.Array | int = 0
  bidirectional_BT: jax.Array | None = None
  window: jax.Array | int = 0
  bidirectional_BS: jax.Array | None = None


def visible(view: Visibility) -> jax.Array:
  """Returns the boolean mask [B,T,S] that `view` describes, split over `context` as the queries are."""
  mask_BTS = view.query_segments_BT[:, :, None] == whole_rows(view.key_segments_BS)[:, None, :]
  if view.causal:
    index_T = jnp.arange(view.query_segments_BT.shape[1]) + view.offset
    distance_TS = index_T[:, None] - jnp.arange(view.key_segments_BS.shape[1])[None, :]
    causal_TS = distance_TS >= 0
    if not (isinstance(view.window, int) and view.window == 0):
      mask_BTS &= distance_TS < view.window
    if view.bidirectional_BT is None:
      return mask_BTS & causal_TS
    keys_BS = whole_rows(view.bidirectional_BT if view.bidirectional_BS is None else view.bidirectional_BS)
    return mask_BTS & (causal_TS | ((view.bidirectional_BT == 1)[:, :, None] & (keys_BS == 1)[:, None, :]))
  return mask_BTS


def whole_rows(x: jax.Array, *rest: str | None) -> jax.Array:
  """Gathers keys' side of attention, [B,S,…], over `context`; `rest` = mesh axes of the further dims."""
  return x if split_over(x) is None else pin(x, BATCH, None, *rest)


def hide_blind(y_BTKGH: jax.Array, view: Visibility) -> jax.Array:
  """Sets the result of queries with nothing to see to 0, for kernels that leave it open."""
  if view.causal and view.query_segments_BT is view.key_segments_BS:
    return y_BTKGH  # each sees itself
  sees_BT = jnp.any(visible(view), axis=-1)
  return jnp.where(sees_BT[:, :, None, None, None], y_BTKGH, jnp.zeros_like(y_BTKGH))


def refuse(path: str, **asked: bool) -> None:
  """Raises a ValueError that names what is asked of a path that has no such thing; `choose` keeps such calls away."""
  if any(asked.values()):
    raise ValueError(
      f"the attention path {path!r} has no {', '.join(name for name, is_asked in asked.items() if is_asked)}"
    )


class Drop(NamedTuple):
  """Dropout on attention weights: its rate and the key of its draws."""

  rate: float
  key: jax.Array


class Bias(NamedTuple):
  """A bias by relative position, in the forms that paths want; what a path does not use is never computed.

  Attributes:
    whole_KGTS: float32, for every query and key.
    blocks_KGWQC: float32, or None where the first query's index is not known while tracing. Queries and keys cut into
      blocks of `block_length`; the block of query block i and key block j depends on j - i alone, and beyond a distance
      on its sign alone: entry w stands for j - i = w - W // 2, the first and the last for all beyond, too.
  """

  whole_KGTS: jax.Array
  blocks_KGWQC: jax.Array | None
