"""Beam search over a model's `prefill` and `extend`; pure, to be jitted by the caller.

Axis letters: see `models/model.py`; J is beams, N tokens written.
"""

from typing import Any

import jax
import jax.numpy as jnp

from models.decode import loose_cache, loose_params, map_cache, on_rows, per_row
from models.model import Cache, Model, Prompts
from models.module import Params
from models.sharding import BATCH, pin

NEVER = -1e9  # score of a beam that is not there

Beams = dict[str, jax.Array]


def search(
  model: Model,
  params: Params,
  prompts: Prompts,
  *,
  beams: int,
  room: int,
  eos_id: int,
  pad_id: int,
  length_penalty: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Finds the likeliest continuations.

  In every step the `2 · beams` likeliest continuations of a row's open beams are made. Those among the first `beams`
  that end with EOS are finished, with the score log-probability / length^length_penalty, where length counts the tokens
  written, EOS included; the first `beams` that do not end stay open. A row stops where its best open beam, scored as it
  stands, is not better than the worst of `beams` finished ones. At `room` tokens all open beams are finished as they
  are. A length penalty above 0 favours longer texts, 0 leaves log-probabilities as they are.

  Args:
    model, params, prompts, room, eos_id, pad_id: see `models.decode.write`.
    beams: J, 1 or more.
    length_penalty: see above.

  Returns:
    int32 [B,J,room] and float32 scores [B,J], the best first.

  Raises:
    ValueError: `beams` is less than 1.

  Reference:
    transformers' `generate(num_beams=…, early_stopping=False)`, which gives the same tokens and scores.
  """
  if beams < 1:
    raise ValueError(f"beams must be 1 or more, got {beams}")
  rows, first_B = prompts["first"].shape[0], prompts["first"]
  cache = loose_cache(model.prefill(params, prompts, room))
  cache = map_cache(lambda x: jnp.repeat(x, beams, axis=0), cache)
  params = loose_params(params)
  scores_BJ = jnp.where(jnp.arange(beams) == 0, 0.0, NEVER) + jnp.zeros((rows, 1))
  state = {
    "open": jnp.full((rows, beams, room), pad_id, jnp.int32),
    "open_scores": scores_BJ,
    "finished": jnp.full((rows, beams, room), pad_id, jnp.int32),
    "scores": jnp.full((rows, beams), NEVER),
    "improves": jnp.ones((rows,), bool),
  }
  state = {name: pin(value, BATCH, *[None] * (value.ndim - 1)) for name, value in state.items()}
  token_M = per_row(lambda x: jnp.repeat(x, beams), first_B)  # M = B·J rows

  def unfinished(carry):
    number, _, _, state = carry
    return (number < room) & jnp.any(state["improves"])

  def body(carry):
    number, cache, token_M, state = carry
    logits_MTV, cache = model.extend(params, cache, token_M[:, None])

    def choose(logits_MV, state):
      return _step(logits_MV, state, number, room, eos_id, length_penalty)

    state, token_M, parent_M = per_row(choose, logits_MTV[:, -1], state)
    return number + 1, _follow(cache, parent_M), token_M, state

  state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), cache, token_M, state))[-1]
  return state["finished"], state["scores"]


def _step(
  logits_MV: jax.Array, state: Beams, number: jax.Array, room: int, eos_id: int, length_penalty: float
) -> tuple[Beams, jax.Array, jax.Array]:
  """Chooses among a device's rows; returns the state, and the tokens and parents [M] of the open beams."""
  rows, beams = state["open_scores"].shape
  vocab = logits_MV.shape[1]
  # Each beam's own 2·J best hold all of the row's 2·J best.
  log_BJV = jax.nn.log_softmax(logits_MV).reshape(rows, beams, vocab)
  kept, kept_token = jax.lax.top_k(log_BJV, min(2 * beams, vocab))
  total = (kept + state["open_scores"][..., None]).reshape(rows, -1)
  best, at = jax.lax.top_k(total, min(2 * beams, total.shape[1]))
  parent, token = at // kept.shape[2], jnp.take_along_axis(kept_token.reshape(rows, -1), at, axis=1)
  texts = jnp.take_along_axis(state["open"], parent[..., None], axis=1)
  texts = jax.lax.dynamic_update_slice_in_dim(texts, token[..., None].astype(jnp.int32), number, axis=2)
  length = (number + 1).astype(jnp.float32)

  ends = (token == eos_id) | (number + 1 == room)
  counted = ends & (jnp.arange(best.shape[1]) < beams) & state["improves"][:, None]
  ended = jnp.where(counted, best / length**length_penalty, NEVER)
  scores, order = jax.lax.top_k(jnp.concatenate([state["scores"], ended], axis=1), beams)
  finished = jnp.take_along_axis(jnp.concatenate([state["finished"], texts], axis=1), order[..., None], axis=1)

  open_scores, order = jax.lax.top_k(jnp.where(token == eos_id, NEVER, best), beams)
  pick = lambda x: jnp.take_along_axis(x, order, axis=1)
  open_texts = jnp.take_along_axis(texts, order[..., None], axis=1)
  improves = state["improves"] & (open_scores[:, 0] / length**length_penalty > scores[:, -1])
  made = {"open": open_texts, "open_scores": open_scores, "finished": finished, "scores": scores, "improves": improves}
  first = beams * jnp.arange(rows)[:, None]
  return made, pick(token).reshape(-1).astype(jnp.int32), (first + pick(parent)).reshape(-1).astype(jnp.int32)


def _follow(cache: Cache, parent_M: jax.Array) -> Cache:
  """Gives each beam its parent's keys and values; what is the prompt's own is the same for all beams of a row."""

  def own(layer: Any) -> Any:
    moved = on_rows(lambda x, parent: x[parent], {k: layer[k] for k in ("keys", "values")}, parent_M)
    return {**layer, **moved}

  layers = cache["layers"]
  return {**cache, "layers": [own(layer) for layer in layers] if isinstance(layers, list) else own(layers)}
