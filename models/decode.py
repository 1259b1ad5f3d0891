"""Decoding and label scoring over a model's `prefill` and `extend`; pure, to be jitted by the caller.

Axis letters: see `models/model.py`; C is candidate labels.
"""

import jax
import jax.numpy as jnp

from models.model import Model, Prompts
from models.module import Params
from models.sharding import BATCH, pin


def greedy(model: Model, params: Params, prompts: Prompts, *, room: int, eos_id: int, pad_id: int) -> jax.Array:
  """Decodes each row greedily with a cache until every row has met EOS or `room` tokens are written.

  Args:
    model: the model.
    params: its parameters.
    prompts: from `model.prompts`.
    room: most tokens to write.
    eos_id: ends a row.
    pad_id: written after a row's EOS.

  Returns:
    int32 [B, room]: the tokens written, EOS included, then `pad_id`.
  """
  cache = model.prefill(params, prompts, room)
  rows = prompts["first"].shape[0]

  def unfinished(carry):
    number, _, _, done, _ = carry
    return (number < room) & ~jnp.all(done)

  def body(carry):
    number, cache, token, done, written = carry
    logits, cache = model.extend(params, cache, token[:, None])
    token = jnp.where(done, pad_id, jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32))
    written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], number, axis=1)
    return number + 1, cache, token, done | (token == eos_id), written

  written = pin(jnp.full((rows, room), pad_id, jnp.int32), BATCH, None)
  done = pin(jnp.zeros((rows,), bool), BATCH)
  carry = (jnp.int32(0), cache, prompts["first"], done, written)
  return jax.lax.while_loop(unfinished, body, carry)[-1]


def score(model: Model, params: Params, prompts: Prompts, labels_CT: jax.Array, weights_CT: jax.Array) -> jax.Array:
  """Scores every label as the continuation of every prompt; each prompt is read once.

  Args:
    model: the model.
    params: its parameters.
    prompts: from `model.prompts`.
    labels_CT: int32 label tokens with EOS, padded on the right.
    weights_CT: float32, 1 on a label's tokens and 0 on padding.

  Returns:
    float32 [B,C]: the sum of the label's token log-probabilities.
  """
  cache = model.prefill(params, prompts, labels_CT.shape[1])

  def one(label):
    tokens_T, weights_T = label
    first_B1 = prompts["first"][:, None]
    rest = pin(jnp.broadcast_to(tokens_T[:-1], (first_B1.shape[0], tokens_T.shape[0] - 1)), BATCH, None)
    logits_BTV, _ = model.extend(params, cache, jnp.concatenate([first_B1, rest], axis=1))
    hit_TV = jnp.arange(logits_BTV.shape[-1]) == tokens_T[:, None]
    chosen_BT = jnp.sum(jnp.where(hit_TV, logits_BTV, 0.0), axis=-1)
    return jnp.sum(weights_T * (chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)), axis=-1)

  return jax.lax.map(one, (labels_CT, weights_CT)).T
