"""Greedy decoding, sampling and label scoring over a model's `prefill` and `extend`; pure, to be jitted by the caller.

Axis letters: see `models/model.py`; C is candidate labels.
"""

from collections.abc import Callable

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
  return _write(model, params, prompts, lambda logits_BV, _: jnp.argmax(logits_BV, axis=-1), room, eos_id, pad_id)


def sample(
  model: Model,
  params: Params,
  prompts: Prompts,
  key: jax.Array,
  *,
  room: int,
  eos_id: int,
  pad_id: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Decodes each row by drawing tokens; the same on any number of devices.

  Args:
    model, params, prompts, room, eos_id, pad_id: see `greedy`.
    key: of the draws; position n uses `fold_in(key, n)`.
    temperature: divides the logits; above 0.
    top_k: only the k likeliest tokens are drawn; 0 = all.
    top_p: only the likeliest tokens that together have this probability are drawn; 1 = all.

  Returns:
    int32 [B, room], as `greedy`.

  Raises:
    ValueError: a setting out of its range.
  """
  if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
    got = f"{temperature}, {top_k} and {top_p}"
    raise ValueError(f"temperature must be above 0, top_k 0 or more, top_p above 0 and at most 1; got {got}")

  def choose(logits_BV, number):
    kept_BV = pin(likeliest(logits_BV / temperature, top_k, top_p), BATCH, None)
    noise_BV = pin(jax.random.gumbel(jax.random.fold_in(key, number), kept_BV.shape), BATCH, None)
    return jnp.argmax(kept_BV + noise_BV, axis=-1)

  return _write(model, params, prompts, choose, room, eos_id, pad_id)


def likeliest(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Sets the logits of all but the likeliest tokens to -inf, see `sample`; the likeliest one always stays.

  Example:
    >>> likeliest(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_k=0, top_p=0.7)[0, 2].item()
    -inf
  """
  ordered_BV = -jnp.sort(-logits_BV, axis=-1)
  least_B1 = ordered_BV[:, -1:]
  if top_k:
    least_B1 = ordered_BV[:, min(top_k, ordered_BV.shape[1]) - 1, None]
  if top_p < 1:
    probability_BV = jax.nn.softmax(ordered_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    nucleus_B1 = jnp.min(jnp.where(before_BV < top_p, ordered_BV, jnp.inf), axis=-1, keepdims=True)
    least_B1 = jnp.maximum(least_B1, nucleus_B1)
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _write(
  model: Model, params: Params, prompts: Prompts, choose: Callable, room: int, eos_id: int, pad_id: int
) -> jax.Array:
  """Writes the tokens that `choose(logits_BV, number)` picks, with a cache, until all rows have ended."""
  cache = model.prefill(params, prompts, room)
  rows = prompts["first"].shape[0]

  def unfinished(carry):
    number, _, _, done, _ = carry
    return (number < room) & ~jnp.all(done)

  def body(carry):
    number, cache, token, done, written = carry
    logits, cache = model.extend(params, cache, token[:, None])
    token = jnp.where(done, pad_id, choose(logits[:, -1], number).astype(jnp.int32))
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
