"""A decoder-only transformer: GPT-2's form and today's (rotary, RMSNorm, gated MLP, grouped queries) from one table.

Axis letters: see `models/model.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import ATTENTION, Attention, Visibility, rotate
from models.layers import NORMS, Embedding, Head, Mlp, dropout, run_layers
from models.model import Batch, Cache, Model, Prompts, logits_of, padded_vocab_size, write_cache
from models.module import Params, Pure, pure, stack_init


@dataclasses.dataclass(frozen=True)
class GPTConfig:
  """Shape and choices of a decoder-only model.

  Attributes:
    vocab_size: the tokenizer's.
    layers, embed_dim, heads, kv_heads, head_dim, mlp_dim: sizes; `heads` is a multiple of `kv_heads`.
    norm: "rmsnorm" or "layernorm". norm_eps: its epsilon.
    positions: "rotary", or "learned" (then no more than `max_length` of them).
    activation: a name in `ACTIVATIONS`; gated: whether the MLP multiplies by a gate.
    bias: on every projection. tied: the output matrix is the embedding's.
    rope_theta: rotary wavelength base.
    dropout: rate on the embedding and on each residual branch.
    dtype, remat, scan_unroll: see configs/base.py `model`. attention: a name in `ATTENTION`.
  """

  vocab_size: int
  layers: int
  embed_dim: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  norm: str = "rmsnorm"
  norm_eps: float = 1e-5
  positions: str = "rotary"
  max_length: int = 0
  activation: str = "silu"
  gated: bool = True
  bias: bool = False
  tied: bool = False
  rope_theta: float = 10_000.0
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"
  scan_unroll: int = 1
  attention: str = "xla"

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding."""
    return padded_vocab_size(self.vocab_size)


def _sizes(layers: int, embed_dim: int, heads: int, kv_heads: int, mlp_dim: int, **rest) -> dict:
  sizes = {"layers": layers, "embed_dim": embed_dim, "heads": heads, "kv_heads": kv_heads, "mlp_dim": mlp_dim}
  return {"head_dim": embed_dim // heads, **sizes, **rest}


_GPT2 = {
  "norm": "layernorm",
  "positions": "learned",
  "max_length": 1024,
  "activation": "gelu",
  "gated": False,
  "bias": True,
  "tied": True,
}
SIZES: dict[str, dict] = {
  "tiny": _sizes(3, 128, 4, 4, 384, tied=True),
  "tiny-gpt2": _sizes(3, 128, 4, 4, 512, **_GPT2),
  "gpt2": _sizes(12, 768, 12, 12, 3072, **_GPT2),
  "gpt2-medium": _sizes(24, 1024, 16, 16, 4096, **_GPT2),
  "gpt2-large": _sizes(36, 1280, 20, 20, 5120, **_GPT2),
  "gpt2-xl": _sizes(48, 1600, 25, 25, 6400, **_GPT2),
  "smollm2-135m": _sizes(30, 576, 9, 3, 1536, tied=True, rope_theta=100_000.0),
  "smollm2-360m": _sizes(32, 960, 15, 5, 2560, tied=True, rope_theta=100_000.0),
  "llama2-7b": _sizes(32, 4096, 32, 32, 11008),
  "llama2-13b": _sizes(40, 5120, 40, 40, 13824),
  "llama3-8b": _sizes(32, 4096, 32, 8, 14336, rope_theta=500_000.0),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Params]]


class Block(nnx.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
    c = config
    # By fan-in, so that small models start as well as large ones (GPT-2's 0.02 is fan-in at 2500); branches that add to
    # the residual stream are scaled down by their number, as GPT-2's are.
    into, branches = c.embed_dim**-0.5, (2 * c.layers) ** -0.5
    self.attention_norm = NORMS[c.norm](c.embed_dim, c.norm_eps)
    heads = (c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    stddevs = (into, into, (c.heads * c.head_dim) ** -0.5 * branches)
    self.attention = Attention(rngs, c.embed_dim, *heads, c.bias, stddevs)
    self.mlp_norm = NORMS[c.norm](c.embed_dim, c.norm_eps)
    self.mlp = Mlp(rngs, c.embed_dim, c.mlp_dim, c.activation, c.gated, c.bias, (into, c.mlp_dim**-0.5 * branches))
    self.config = c

  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend, key: jax.Array | None):
    c = self.config
    y_BTD = self.attention_norm(x_BTD)
    q, (k, v) = self.attention.queries(y_BTD), self.attention.keys_values(y_BTD)
    if c.positions == "rotary":
      q, k = rotate(q, positions_BT, c.rope_theta), rotate(k, positions_BT, c.rope_theta)
    y_BTKGH, cached = attend(q, k, v)
    keys = (None, None) if key is None else jax.random.split(key)
    x_BTD += dropout(self.attention.output(y_BTKGH), c.dropout, keys[0])
    x_BTD += dropout(self.mlp(self.mlp_norm(x_BTD)), c.dropout, keys[1])
    return x_BTD, cached


def make_model(size: str, vocab_size: int, **fields) -> Model:
  """Builds a decoder-only model.

  Args:
    size: a row of `SIZES`.
    vocab_size: of the tokenizer.
    **fields: any field of `GPTConfig`, over the row's.

  Returns:
    The model's pure functions.

  Raises:
    ValueError: unknown size or field, or heads that do not divide.
  """
  if size not in SIZES:
    raise ValueError(f"config.model.size is {size!r}; sizes of gpt are {sorted(SIZES)}")
  unknown = set(fields) - {field.name for field in dataclasses.fields(GPTConfig)}
  if unknown:
    raise ValueError(f"config.model.overrides has unknown {sorted(unknown)}; see GPTConfig in models/gpt.py")
  config = GPTConfig(vocab_size=vocab_size, **{**SIZES[size], **fields})
  if config.heads % config.kv_heads:
    raise ValueError(f"heads ({config.heads}) must be a multiple of kv_heads ({config.kv_heads})")
  parts = _parts(config)
  return Model(
    config=config,
    init=partial(_init, parts),
    features=partial(_features, config, parts),
    head=partial(_head, config),
    prompts=_prompts,
    prefill=partial(_prefill, config, parts),
    extend=partial(_extend, config, parts),
  )


def _parts(c: GPTConfig) -> dict[str, Pure]:
  rows, positions = c.padded_vocab_size, c.max_length if c.positions == "learned" else 0
  parts = {
    "embed": pure(lambda rngs: Embedding(rngs, rows, c.embed_dim, 0.02, c.dtype, positions)),
    "layers": pure(partial(Block, c)),
    "norm": pure(lambda rngs: NORMS[c.norm](c.embed_dim, c.norm_eps)),
  }
  if not c.tied:
    parts["head"] = pure(lambda rngs: Head(rngs, c.embed_dim, rows, 0.02))
  return {name: _stacked(part, c.layers) if name == "layers" else part for name, part in parts.items()}


def _stacked(part: Pure, count: int) -> Pure:
  return Pure(stack_init(part, count), part.apply)


def _init(parts: dict[str, Pure], key: jax.Array) -> Params:
  return {name: part.init(jax.random.fold_in(key, i)) for i, (name, part) in enumerate(parts.items())}


def _run(c: GPTConfig, parts, params: Params, tokens_BT, positions_BT, attend, cache=None, key=None):
  """Embeds, runs the layers and the last norm; `attend(q, k, v, cached)` sees each layer's slice of the cache."""
  x_BTD = parts["embed"].apply(params["embed"], tokens_BT, positions_BT)
  x_BTD = dropout(x_BTD, c.dropout, None if key is None else jax.random.fold_in(key, c.layers))

  def layer(x_BTD, weights, extra):
    number, cached = extra
    layer_key = None if key is None else jax.random.fold_in(key, number)
    return parts["layers"].apply(weights, x_BTD, positions_BT, lambda q, k, v: attend(q, k, v, cached), layer_key)

  extra = (jnp.arange(c.layers), cache)
  x_BTD, cached = run_layers(layer, x_BTD, params["layers"], extra, c.remat, c.scan_unroll)
  return parts["norm"].apply(params["norm"], x_BTD), cached


def _features(c: GPTConfig, parts, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
  segments_BT = batch["decoder_segment_ids"]
  view = Visibility(segments_BT, segments_BT, causal=True, bidirectional_BT=batch.get("decoder_bidirectional"))

  def attend(q, k, v, _):
    return ATTENTION[c.attention](q, k, v, view, None, c.head_dim**-0.5), None

  tokens, positions = batch["decoder_input_tokens"], batch["decoder_positions"]
  return _run(c, parts, params, tokens, positions, attend, key=key)[0]


def _head(c: GPTConfig, params: Params) -> jax.Array:
  return params["embed"]["tokens"].T if c.tied else params["head"]["kernel"]


def _prompts(prompts: Sequence[Sequence[int]], length: int, start_id: int) -> Prompts:
  """Pads on the left, so that all rows go on at the same index: `[pad…, start, tokens…]`, the last one apart."""
  rows = len(prompts)
  tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
  first = np.full((rows,), start_id, np.int32)
  for i, prompt in enumerate(prompts):
    if len(prompt):
      tokens[i, length - len(prompt) :] = [start_id, *prompt[:-1]]
      segments[i, length - len(prompt) :] = 1
      positions[i, length - len(prompt) :] = np.arange(len(prompt))
      first[i] = prompt[-1]
  return {"tokens": tokens, "segments": segments, "positions": positions, "first": first}


def _prefill(c: GPTConfig, parts, params: Params, prompts: Prompts, room: int) -> Cache:
  segments_BS = prompts["segments"]
  view = Visibility(segments_BS, segments_BS, causal=True)

  def attend(q, k, v, _):
    widths = ((0, 0), (0, room), (0, 0), (0, 0))
    cached = {"keys": jnp.pad(k, widths), "values": jnp.pad(v, widths)}
    return ATTENTION[c.attention](q, k, v, view, None, c.head_dim**-0.5), cached

  _, layers = _run(c, parts, params, prompts["tokens"], prompts["positions"], attend)
  rows = {
    "segments": jnp.pad(segments_BS, ((0, 0), (0, room)), constant_values=1),
    "position": jnp.sum(segments_BS, axis=1, dtype=jnp.int32),
  }
  return {"layers": layers, "rows": rows, "index": jnp.int32(segments_BS.shape[1])}


def _extend(c: GPTConfig, parts, params: Params, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
  length, index = tokens_BT.shape[1], cache["index"]
  view = Visibility(jnp.ones_like(tokens_BT), cache["rows"]["segments"], causal=True, offset=index)

  def attend(q, k, v, cached):
    cached = write_cache(cached, index, keys=k, values=v)
    return ATTENTION[c.attention](q, cached["keys"], cached["values"], view, None, c.head_dim**-0.5), cached

  positions_BT = cache["rows"]["position"][:, None] + jnp.arange(length)
  x_BTD, layers = _run(c, parts, params, tokens_BT, positions_BT, attend, cache=cache["layers"])
  rows = {**cache["rows"], "position": cache["rows"]["position"] + length}
  return logits_of(x_BTD, _head(c, params), c.vocab_size), {"layers": layers, "rows": rows, "index": index + length}
