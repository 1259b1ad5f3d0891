"""What a model is to the rest of Argot: a tuple of pure functions over a nested dict of parameters.

Axis letters, here and in every file of `models/`:
  B batch, T decoder length, S key or encoder length, D embed, K kv heads, G query heads for each kv head, H head dim,
  F mlp, V vocab (padded), L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.module import Params
from models.sharding import BATCH, pin, spec

Batch = dict[str, jax.Array]
Prompts = dict[str, Any]  # tokens, segments, positions [B,S] and first [B], all int32
Cache = dict[str, Any]

VOCAB_MULTIPLE = 128  # the embedding has this many rows or a multiple: TPU lanes, and tensor axes divide it


class Model(NamedTuple):
  """A language model as pure functions.

  Attributes:
    config: the architecture's frozen dataclass; has `vocab_size` (the tokenizer's) and `padded_vocab_size`.
    init: `key -> params`, float32.
    features: `(params, batch, key=None) -> x_BTD`, the decoder's last hidden states in the compute dtype; `key=None`
      means no dropout. `batch` has the keys of DESIGN's Batch.
    head: `params -> w_DV`, so that logits are `features @ head`; any constant scale is folded in.
    prompts: on the host, `(list of token ids, length, start_id) -> Prompts`, padded on the side that suits the
      architecture; `length` is at least the longest prompt's.
    prefill: `(params, prompts, room) -> cache`. Reads the prompts and makes room for `room` further decoder tokens, the
      first of which is `prompts["first"]`.
    extend: `(params, cache, tokens_BT) -> (logits_BTV float32, cache)`, the next T tokens of each row at once. The
      vocabulary's padding has logits of -inf.
  """

  config: Any
  init: Callable[[jax.Array], Params]
  features: Callable[..., jax.Array]
  head: Callable[[Params], jax.Array]
  prompts: Callable[[Sequence[Sequence[int]], int, int], Prompts]
  prefill: Callable[[Params, Prompts, int], Cache]
  extend: Callable[[Params, Cache, jax.Array], tuple[jax.Array, Cache]]


def padded_vocab_size(vocab_size: int) -> int:
  """Rounds a vocabulary up to a multiple of `VOCAB_MULTIPLE`; the extra rows are never targets or answers."""
  return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def write_cache(cached: Params, index: jax.Array, **new: jax.Array) -> Params:
  """Writes new [B,T,K,H] entries into a layer's cache from slot `index` on; other entries stay."""
  written = {
    name: jax.lax.dynamic_update_slice_in_dim(cached[name], value.astype(cached[name].dtype), index, axis=1)
    for name, value in new.items()
  }
  return {**cached, **written}


def logits_of(x_BTD: jax.Array, w_DV: jax.Array, vocab_size: int) -> jax.Array:
  """Returns float32 logits [B,T,V], whole on each device; the vocabulary's padding gets -inf.

  For decoding and scoring, where T is small; training never builds this array (`train/loss.py`).
  """
  w_DV = pin(w_DV.astype(x_BTD.dtype), None, "tensor")
  layout = spec(BATCH, None, "tensor")
  logits = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, preferred_element_type=jnp.float32, out_sharding=layout)
  logits = pin(logits, BATCH, None, None)
  return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
