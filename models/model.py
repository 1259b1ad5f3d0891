"""What a model is to the rest of Argot: a tuple of pure functions over a nested dict of parameters.

Axis letters, here and in every file of `models/`:
  B batch, T decoder length, S key or encoder length, D embed, K kv heads, G query heads for each kv head, H head dim,
  F mlp, V vocab (padded), L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.layers import remat_policy
from models.module import Params
from models.sharding import BATCH, pin, spec

Batch = dict[str, jax.Array]
Prompts = dict[str, Any]  # tokens, segments, positions [B,S] and first [B], all int32; perhaps bidirectional [B,S]
Cache = dict[str, Any]

DTYPES = ("float32", "bfloat16")  # of products, and of stored parameters
VOCAB_MULTIPLE = 128  # the embedding has this many rows or a multiple: TPU lanes, and tensor axes divide it


class Model(NamedTuple):
  """A language model as pure functions.

  Attributes:
    config: the architecture's frozen dataclass; has `vocab_size` (the tokenizer's) and `padded_vocab_size`.
    init: `key -> params`, float32 (or in the config's `storage`).
    features: `(params, batch, key=None) -> x_BTD`, the decoder's last hidden states in the compute dtype; `key=None`
      means no dropout. `batch` has the keys of DESIGN's Batch.
    head: `params -> w_DV`, so that logits are `features @ head` (then capped); any constant scale is folded in.
    prompts: on the host, `(list of token ids, length, start_id) -> Prompts`, padded on the side that suits the
      architecture; `length` is at least the longest prompt's.
    prefill: `(params, prompts, room) -> cache`. Reads the prompts and makes room for `room` further decoder tokens, the
      first of which is `prompts["first"]`. Where there is `prompts["bidirectional"]`, a decoder-only prompt sees
      itself in both directions, as in training with a bidirectional prefix.
    extend: `(params, cache, tokens_BT) -> (logits_BTV float32, cache)`, the next T tokens of each row at once. The
      vocabulary's padding has logits of -inf.
    paths: `(batch, training) -> {kind: name}`, which path in `ATTENTION` each kind of attention ("encoder", "decoder",
      "cross") takes for a batch (or its shapes), where the program that is being traced will run.
    logit_cap: logits become `logit_cap · tanh(logits / logit_cap)`; 0 = no cap.
  """

  config: Any
  init: Callable[[jax.Array], Params]
  features: Callable[..., jax.Array]
  head: Callable[[Params], jax.Array]
  prompts: Callable[[Sequence[Sequence[int]], int, int], Prompts]
  prefill: Callable[[Params, Prompts, int], Cache]
  extend: Callable[[Params, Cache, jax.Array], tuple[jax.Array, Cache]]
  paths: Callable[..., dict[str, str]]
  logit_cap: float = 0.0


def make_config(form: type, fields: Mapping[str, Any]) -> Any:
  """Returns an architecture's dataclass with the given fields.

  Args:
    form: `GPTConfig` or `T5Config`.
    fields: name -> value.

  Raises:
    ValueError: a field is unknown, or one without a default (a size) is missing or no whole number of 1 or more; an
      unknown dtype, storage or remat; a rate of dropout that is none.
  """
  known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(form)}
  unknown, missing = set(fields) - set(known), {name for name, needed in known.items() if needed} - set(fields)
  if unknown or missing:
    what = f"unknown {sorted(unknown)}" if unknown else f"no {sorted(missing)}"
    raise ValueError(
      f"config.model.overrides has {what}; see {form.__name__} in {form.__module__.replace('.', '/')}.py"
    )
  config = form(**fields)
  for name in (name for name, needed in known.items() if needed):
    if not isinstance(fields[name], int) or fields[name] < 1:
      raise ValueError(f"config.model.overrides.{name} is {fields[name]!r}; expected a whole number of 1 or more")
  if not 0 <= config.dropout < 1:
    raise ValueError(f"config.model.dropout is {config.dropout}; expected a rate of 0 to below 1, such as 0.1")
  for name in ("dtype", "storage"):
    if getattr(config, name) not in DTYPES:
      raise ValueError(f"config.model.{name} is {getattr(config, name)!r}; known: {list(DTYPES)}")
  remat_policy(config.remat)
  return config


def stored(init: Callable[[jax.Array], Params], dtype: str) -> Callable[[jax.Array], Params]:
  """Returns an `init` whose parameters are of a dtype."""
  return lambda key: jax.tree.map(lambda x: x.astype(dtype), init(key))


def learned_positions(model: Model) -> int:
  """Returns how many positions a model has a vector for; 0 = any position will do."""
  return model.config.max_length if getattr(model.config, "positions", "") == "learned" else 0


def padded_vocab_size(vocab_size: int) -> int:
  """Rounds a vocabulary up to a multiple of `VOCAB_MULTIPLE`; the extra rows are never targets or answers."""
  return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def turned(x: jax.Array) -> jax.Array:
  """Swaps tokens and heads of keys or values: [B,S,K,H] to [B,K,S,H] as they are cached, or back.

  Attention multiplies head by head: a cache that has the heads outside is not copied for every token.
  """
  return jnp.swapaxes(x, 1, 2)


def write_cache(cached: Params, index: jax.Array, **new: jax.Array) -> Params:
  """Writes new [B,T,K,H] entries into a layer's cache [B,K,S,H] from slot `index` on; other entries stay."""
  written = {
    name: jax.lax.dynamic_update_slice_in_dim(cached[name], turned(value).astype(cached[name].dtype), index, axis=2)
    for name, value in new.items()
  }
  return {**cached, **written}


def logits_of(x_BTD: jax.Array, w_DV: jax.Array, vocab_size: int, cap: float = 0.0) -> jax.Array:
  """Returns float32 logits [B,T,V], whole on each device; the vocabulary's padding gets -inf. `cap`: see `Model`.

  For decoding and scoring, where T is small; training never builds this array (`train/loss.py`).
  """
  w_DV = pin(w_DV.astype(x_BTD.dtype), None, "tensor")
  layout = spec(BATCH, None, "tensor")
  logits = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, preferred_element_type=jnp.float32, out_sharding=layout)
  logits = pin(logits, BATCH, None, None)
  logits = cap * jnp.tanh(logits / cap) if cap else logits
  return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
