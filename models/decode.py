"""Decoding and label scoring over a model's `prefill` and `extend`; pure, to be jitted by the caller.

Axis letters: see `models/model.py`; C is candidate labels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from models.layers import unstack
from models.model import Cache, Model, Prompts
from models.module import Params
from models.sharding import BATCH, per_device, pin, platform, spec

Carry = dict[str, Any]


class Choice(NamedTuple):
  """How the next token is chosen.

  Attributes:
    temperature: divides the logits that are drawn from; 0 = the likeliest token, nothing is drawn.
    top_k: only the k likeliest tokens are drawn; 0 = all.
    top_p: only the likeliest tokens that together have this probability are drawn; 1 = all.
    repetition_penalty: logits of tokens that the decoder has read or written are divided by it, negative ones
      multiplied; 1 = none (Keskar et al. 2019, as transformers has it; padding is not read, EOS stays as it is).
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0


GREEDY = Choice()


class Trie(NamedTuple):
  """The token sequences that may be written, from `make_trie`; N is nodes, W tokens that occur.

  Attributes:
    tokens_W: int32.
    next_NW: int32, the node after a token, or -1 where it may not follow. Node 0 is the start.
    allowed_NV: bool.
  """

  tokens_W: np.ndarray
  next_NW: np.ndarray
  allowed_NV: np.ndarray


def make_trie(sequences: Sequence[Sequence[int]], vocab_size: int) -> Trie:
  """Builds the tree of sequences, each of which ends with EOS.

  Raises:
    ValueError: no sequence, an empty one, or one that is the beginning of another.

  Example:
    >>> make_trie([[5, 1], [5, 6, 1]], 8).next_NW.tolist()  # tokens 1, 5, 6
    [[-1, 1, -1], [2, -1, 3], [-1, -1, -1], [4, -1, -1], [-1, -1, -1]]
  """
  nodes: list[dict[int, int]] = [{}]
  ends = set()
  for sequence in sequences:
    node = 0
    for token in sequence:
      if token not in nodes[node]:
        nodes[node][token] = len(nodes)
        nodes.append({})
      node = nodes[node][token]
    ends.add(node)
  if not sequences or 0 in ends or any(nodes[node] for node in ends):
    raise ValueError(f"expected sequences none of which begins another, got {[list(s) for s in sequences]}")
  tokens = sorted({token for node in nodes for token in node})
  allowed = np.zeros((len(nodes), vocab_size), bool)
  for number, node in enumerate(nodes):
    allowed[number, list(node)] = True
  following = np.array([[node.get(token, -1) for token in tokens] for node in nodes], np.int32)
  return Trie(np.array(tokens, np.int32), following, allowed)


def check_choice(choice: Choice) -> None:
  """Raises a ValueError where a setting is out of its range."""
  if not (choice.temperature >= 0 and choice.top_k >= 0 and 0 < choice.top_p <= 1 and choice.repetition_penalty > 0):
    raise ValueError(
      "temperature and top_k must be 0 or more, top_p above 0 and at most 1, repetition_penalty above 0; got "
      f"{choice.temperature}, {choice.top_k}, {choice.top_p} and {choice.repetition_penalty}"
    )
  if choice.temperature == 0 and (choice.top_k or choice.top_p < 1):
    raise ValueError(f"top_k and top_p are of draws: set a temperature, got {choice}")


def likeliest(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Sets the logits of all but the likeliest tokens to -inf, see `Choice`; the likeliest one always stays.

  Example:
    >>> likeliest(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_k=0, top_p=0.7)[0, 2].item()
    -inf
  """
  if not top_k and top_p == 1:
    return logits_BV  # a sort for each token costs a CPU as much as the rest of it
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


def write(
  model: Model,
  params: Params,
  prompts: Prompts,
  key: jax.Array | None = None,
  *,
  room: int,
  eos_id: int,
  pad_id: int,
  choice: Choice = GREEDY,
  trie: Trie | None = None,
) -> jax.Array:
  """Decodes each row with a cache until every row has met EOS or `room` tokens are written, in one program.

  Args:
    model: the model.
    params: its parameters.
    prompts: from `model.prompts`.
    key: of the draws, where `choice` has a temperature; position n uses `fold_in(key, n)`, so that they are the same on
      any number of devices.
    room: most tokens to write.
    eos_id: ends a row.
    pad_id: written after a row's EOS.
    choice: how tokens are chosen.
    trie: what may be written, or None for anything.

  Returns:
    int32 [B, room]: the tokens written, EOS included, then `pad_id`.

  Raises:
    ValueError: a setting out of its range, or draws without a key.
  """
  if key is None:
    if choice.temperature > 0:
      raise ValueError(f"drawing needs a key, got none with {choice}")
    key = jax.random.key(0)  # nothing is drawn
  carry = begin(model, params, prompts, room=room, pad_id=pad_id, choice=choice)
  settings = {"eos_id": eos_id, "pad_id": pad_id, "choice": choice, "trie": trie}
  return advance(model, params, carry, key, jnp.int32(room), **settings)["written"]


def begin(model: Model, params: Params, prompts: Prompts, *, room: int, pad_id: int, choice: Choice) -> Carry:
  """Reads the prompts.

  Args:
    model, params, prompts, room, pad_id, choice: see `write`.

  Returns:
    What `advance` goes on from: `written` int32 [B, room], `number` of tokens written so far, `done` bool [B], and
    more.

  Raises:
    ValueError: a setting out of its range.
  """
  check_choice(choice)
  cache, first_B = model.prefill(params, prompts, room), prompts["first"]
  rows = first_B.shape[0]
  carry = {"number": jnp.int32(0), "cache": loose_cache(cache), "token": first_B}
  carry["written"] = pin(jnp.full((rows, room), pad_id, jnp.int32), BATCH, None)
  carry["done"] = pin(jnp.zeros((rows,), bool), BATCH)
  carry["node"] = pin(jnp.zeros((rows,), jnp.int32), BATCH)
  if choice.repetition_penalty != 1.0:
    columns = jnp.arange(model.config.padded_vocab_size)
    read_BV = first_B[:, None] == columns
    if "encoder" not in params:  # a decoder-only model has read the prompt, too
      mark = lambda read, x: (read | ((x[0][:, None] == columns) & (x[1][:, None] == 1)), None)
      read_BV, _ = jax.lax.scan(mark, read_BV, (prompts["tokens"].T, prompts["segments"].T))
    carry["read"] = read_BV
  return carry


def advance(
  model: Model,
  params: Params,
  carry: Carry,
  key: jax.Array,
  until: jax.Array,
  *,
  eos_id: int,
  pad_id: int,
  choice: Choice,
  trie: Trie | None = None,
) -> Carry:
  """Writes until `until` tokens are written (no more than there is room for) or all rows are done.

  Args:
    carry: from `begin` or `advance`; a row may be set `done` between two calls.
    until: int32.
    model, params, key, eos_id, pad_id, choice, trie: see `write`.
  """
  params = loose_params(params)

  def unfinished(carry):
    return (carry["number"] < until) & ~jnp.all(carry["done"])

  def body(carry):
    number, done, new = carry["number"], carry["done"], dict(carry)
    logits_BTV, new["cache"] = model.extend(params, carry["cache"], carry["token"][:, None])
    logits_BV = logits_BTV[:, -1]
    if "read" in carry:
      penalty = choice.repetition_penalty
      penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
      # Never EOS, which ends the prompt of a decoder-only task as well: an answer would be kept from ending.
      ends_V = jnp.arange(logits_BV.shape[-1]) == eos_id
      logits_BV = jnp.where(carry["read"] & ~ends_V, penalised_BV, logits_BV)
    if trie is not None:
      allowed_BV = jnp.asarray(trie.allowed_NV).at[carry["node"]].get(out_sharding=spec(BATCH, None))
      logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    token_B = jnp.where(done, pad_id, _choose(choice, logits_BV, jax.random.fold_in(key, number)).astype(jnp.int32))
    if trie is not None:
      next_BW = jnp.asarray(trie.next_NW).at[carry["node"]].get(out_sharding=spec(BATCH, None))
      following_B = jnp.sum(jnp.where(trie.tokens_W == token_B[:, None], next_BW, 0), axis=1)
      new["node"] = jnp.where(done, carry["node"], following_B)
    if "read" in carry:
      new["read"] = carry["read"] | (jnp.arange(carry["read"].shape[1]) == token_B[:, None])
    new["written"] = jax.lax.dynamic_update_slice_in_dim(carry["written"], token_B[:, None], number, axis=1)
    return new | {"number": number + 1, "token": token_B, "done": done | (token_B == eos_id)}

  return jax.lax.while_loop(unfinished, body, carry)


def _choose(choice: Choice, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
  if choice.temperature == 0:
    return _first_of_most(logits_BV)
  kept_BV = pin(likeliest(logits_BV / choice.temperature, choice.top_k, choice.top_p), BATCH, None)
  noise_BV = pin(jax.random.gumbel(key, kept_BV.shape), BATCH, None)
  return _first_of_most(kept_BV + noise_BV)


def _first_of_most(logits_BV: jax.Array) -> jax.Array:
  """Is `argmax` in two plain reductions, which a CPU does in a third of the time of one that carries an index."""
  columns = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
  less_BV = logits_BV < jnp.max(logits_BV, axis=-1, keepdims=True)  # nothing is less than NaN
  return jnp.min(jnp.where(less_BV, logits_BV.shape[1], columns), axis=-1)


# Where layers are taken out of their stack before decoding: a loop over them would slice each weight and write each
# cache anew for every token; and where a tied output matrix is turned around, once instead of for every token. It
# takes the weights' memory once more, which a CPU's host has.
LOOSE = frozenset({"cpu"})


def loose_params(params: Params) -> Params:
  """Returns parameters for `extend`, laid out as `LOOSE` says; `prefill` wants those that it is given."""
  if platform() not in LOOSE:
    return params
  stack = params.get("decoder", params)
  if isinstance(stack["layers"], list):
    return params
  head = {} if "head" in params else {"head": {"kernel": params["embed"]["tokens"].T}}
  if "decoder" in params:
    return {**params, **head, "decoder": {**params["decoder"], "layers": unstack(params["decoder"]["layers"])}}
  return {**params, **head, "layers": unstack(params["layers"])}


def loose_cache(cache: Cache) -> Cache:
  """Returns a cache with its layers as a list, where `loose_params` does so."""
  return {**cache, "layers": unstack(cache["layers"])} if platform() in LOOSE else cache


def spread(carry: Carry, copies: int) -> Carry:
  """Repeats each row of what `begin` returns: a prompt is read once for all its draws."""
  return _map_rows(lambda x: jnp.repeat(x, copies, axis=0), carry)


def pick(carry: Carry, rows_M: jax.Array) -> Carry:
  """Keeps some rows of what `advance` returns; int32, each device's as many, numbered from its own first one."""
  return _map_rows(lambda x, rows: x[rows], carry, rows_M)


def _map_rows(function: Callable[..., Any], carry: Carry, *rows: jax.Array) -> Carry:
  own = {name: per_row(function, value, *rows) for name, value in carry.items() if name not in ("cache", "number")}
  return carry | own | {"cache": map_cache(function, carry["cache"], *rows)}


def map_cache(function: Callable[..., Any], cache: Cache, *rows: jax.Array) -> Cache:
  """Applies `function(array with rows on axis 0, *rows)` to all of a cache that has rows."""
  own = jax.tree.map(lambda x: per_row(function, x, *rows), cache["rows"])
  return {**cache, "layers": on_rows(function, cache["layers"], *rows), "rows": own}


def per_row(function: Callable[..., Any], *arrays: Any) -> Any:
  """Runs a function whose arguments' and results' rows lie on the same device."""
  return per_device(function, (P(BATCH),) * len(arrays), P(BATCH))(*arrays)


def on_rows(function: Callable[..., Any], tree: Any, *rows: jax.Array) -> Any:
  """Applies `function(leaf with rows on axis 0, *rows)` to the layers of a cache, which may be stacked."""

  def apply(leaf: jax.Array) -> jax.Array:
    axis = leaf.ndim - 4
    layout = jax.typeof(leaf).sharding.spec
    run = lambda x, *rows: jnp.moveaxis(function(jnp.moveaxis(x, axis, 0), *rows), 0, axis)
    return per_device(run, (layout, *(P(BATCH),) * len(rows)), layout)(leaf, *rows)

  return jax.tree.map(apply, tree)


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
