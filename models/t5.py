"""T5: an encoder-decoder transformer with relative position bias; v1.0 (ReLU, tied) and v1.1 (gated GELU, untied).

No bias on projections, no scaling of attention logits (it is folded into the initialisation), RMS norm, the relative
bias shared by a stack's layers. Axis letters: see `models/model.py`.

Reference:
  Raffel et al. 2020 (arXiv 1910.10683); v1.1: Shazeer 2020 (arXiv 2002.05202).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import ATTENTION, CACHED, Attention, Call, RelativeBias, choose, named, path_of
from models.layers import ACTIVATIONS, Embedding, Head, Mlp, RMSNorm, dropout, fold, run_layers
from models.model import (
  Batch,
  Cache,
  Model,
  Prompts,
  logits_of,
  make_config,
  padded_vocab_size,
  stored,
  turned,
  write_cache,
)
from models.module import Params, Pure, pure, stack_init
from models.sharding import parts_of
from models.visibility import Drop, Visibility


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape and choices of a T5.

  Attributes:
    vocab_size: the tokenizer's.
    encoder_layers, decoder_layers, embed_dim, heads, head_dim, mlp_dim: sizes.
    activation: a name in `ACTIVATIONS`; gated: v1.1's gate. tied: the output matrix is the embedding's (v1.0).
    scale_logits: the output matrix times `embed_dim`^-0.5 (v1.0).
    buckets, max_distance: of the relative position bias; bias_stddev: its scale at the start, 0 = embed_dim^-0.5.
    dropout: rate on the embeddings, on each residual branch, on attention weights and inside the MLP.
    dtype, storage, remat, scan_unroll, attention, attention_block: see configs/base.py `model`.
  """

  vocab_size: int
  encoder_layers: int
  decoder_layers: int
  embed_dim: int
  heads: int
  head_dim: int
  mlp_dim: int
  activation: str = "gelu"
  gated: bool = True
  tied: bool = False
  scale_logits: bool = False
  norm_eps: float = 1e-6
  buckets: int = 32
  max_distance: int = 128
  bias_stddev: float = 0.0
  dropout: float = 0.0
  dtype: str = "float32"
  storage: str = "float32"
  remat: str = "none"
  scan_unroll: int = 1
  attention: str = "auto"
  attention_block: int = 0

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding."""
    return padded_vocab_size(self.vocab_size)


def _sizes(layers: int, embed_dim: int, heads: int, head_dim: int, mlp_dim: int, **rest) -> dict:
  return {
    "encoder_layers": layers,
    "decoder_layers": layers,
    "embed_dim": embed_dim,
    "heads": heads,
    "head_dim": head_dim,
    "mlp_dim": mlp_dim,
    **rest,
  }


_V1_0 = {"activation": "relu", "gated": False, "tied": True, "scale_logits": True}
SIZES: dict[str, dict] = {
  "custom": {},  # every field from config.model.overrides, as for imported weights
  # Biases that are large from the start tell near from far at once; small ones take thousands of steps to grow.
  "tiny": _sizes(2, 128, 4, 32, 384, bias_stddev=3.0),
  "tiny-v1.0": _sizes(2, 128, 4, 32, 512, **_V1_0),
  "t5-small": _sizes(6, 512, 8, 64, 2048, **_V1_0),
  "t5-base": _sizes(12, 768, 12, 64, 3072, **_V1_0),
  "t5-large": _sizes(24, 1024, 16, 64, 4096, **_V1_0),
  "t5-3b": _sizes(24, 1024, 32, 128, 16384, **_V1_0),
  "t5-11b": _sizes(24, 1024, 128, 128, 65536, **_V1_0),
  "t5-v1.1-small": _sizes(8, 512, 6, 64, 1024),
  "t5-v1.1-base": _sizes(12, 768, 12, 64, 2048),
  "t5-v1.1-large": _sizes(24, 1024, 16, 64, 2816),
  "t5-v1.1-xl": _sizes(24, 2048, 32, 64, 5120),
  "t5-v1.1-xxl": _sizes(24, 4096, 64, 64, 10240),
  "byt5-small": _sizes(12, 1472, 6, 64, 3584) | {"decoder_layers": 4},
  "byt5-base": _sizes(18, 1536, 12, 64, 3968) | {"decoder_layers": 6},
  "ul2": _sizes(32, 4096, 16, 256, 16384, activation="silu"),
}


def _attention(c: T5Config, rngs: nnx.Rngs) -> Attention:
  # Queries carry the 1/sqrt(H) that other models put on the logits.
  into_query, into_kv = (c.embed_dim * c.head_dim) ** -0.5, c.embed_dim**-0.5
  stddevs = (into_query, into_kv, (c.heads * c.head_dim) ** -0.5)
  return Attention(rngs, c.embed_dim, c.heads, 1, c.head_dim, stddevs)


def _mlp(c: T5Config, rngs: nnx.Rngs) -> Mlp:
  stddevs = (c.embed_dim**-0.5, c.mlp_dim**-0.5)
  return Mlp(rngs, c.embed_dim, c.mlp_dim, c.activation, c.gated, False, stddevs)


class EncoderBlock(nnx.Module):
  """Pre-norm self-attention and MLP."""

  def __init__(self, config: T5Config, rngs: nnx.Rngs):
    c = self.config = config
    self.attention_norm, self.attention = RMSNorm(c.embed_dim, c.norm_eps), _attention(c, rngs)
    self.mlp_norm, self.mlp = RMSNorm(c.embed_dim, c.norm_eps), _mlp(c, rngs)

  def __call__(self, x_BSD, attend, key):
    keys = (None, None) if key is None else jax.random.split(key)
    y_BSD = self.attention_norm(x_BSD)
    y = attend(*named(self.attention.queries(y_BSD), *self.attention.keys_values(y_BSD)), fold(keys[0], 1))
    x_BSD += dropout(self.attention.output(y), self.config.dropout, keys[0])
    y_BSD = self.mlp(self.mlp_norm(x_BSD), self.config.dropout, fold(keys[1], 1))
    return x_BSD + dropout(y_BSD, self.config.dropout, keys[1])


class DecoderBlock(nnx.Module):
  """Pre-norm self-attention, cross-attention and MLP."""

  def __init__(self, config: T5Config, rngs: nnx.Rngs):
    c = self.config = config
    self.attention_norm, self.attention = RMSNorm(c.embed_dim, c.norm_eps), _attention(c, rngs)
    self.cross_norm, self.cross = RMSNorm(c.embed_dim, c.norm_eps), _attention(c, rngs)
    self.mlp_norm, self.mlp = RMSNorm(c.embed_dim, c.norm_eps), _mlp(c, rngs)

  def __call__(self, x_BTD, attend, attend_cross, key):
    """`attend(q, k, v, key)` and `attend_cross(q, project, key)` each return the result and what to cache."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y_BTD = self.attention_norm(x_BTD)
    y, cached = attend(*named(self.attention.queries(y_BTD), *self.attention.keys_values(y_BTD)), fold(keys[0], 1))
    x_BTD += dropout(self.attention.output(y), self.config.dropout, keys[0])
    q = self.cross.queries(self.cross_norm(x_BTD))
    y, cached_cross = attend_cross(q, self.cross.keys_values, fold(keys[1], 1))
    x_BTD += dropout(self.cross.output(y), self.config.dropout, keys[1])
    y_BTD = self.mlp(self.mlp_norm(x_BTD), self.config.dropout, fold(keys[2], 1))
    x_BTD += dropout(y_BTD, self.config.dropout, keys[2])
    return x_BTD, {**cached, **cached_cross}


class CrossProjection(nnx.Module):
  """A decoder layer's view that only projects the encoder's output (prefill), over the same parameters."""

  def __init__(self, config: T5Config, rngs: nnx.Rngs):
    self.cross = _attention(config, rngs)

  def __call__(self, x_BSD):
    return self.cross.keys_values(x_BSD)


def make_model(size: str, vocab_size: int, **fields) -> Model:
  """Builds a T5.

  Args:
    size: a row of `SIZES`.
    vocab_size: of the tokenizer.
    **fields: any field of `T5Config`, over the row's.

  Returns:
    The model's pure functions.

  Raises:
    ValueError: unknown size, field or choice, or buckets of relative positions that cannot be.
  """
  if size not in SIZES:
    raise ValueError(f"config.model.size is {size!r}; sizes of t5 are {sorted(SIZES)}")
  config = make_config(T5Config, {**SIZES[size], **fields, "vocab_size": vocab_size})
  if config.activation not in ACTIVATIONS:
    raise ValueError(f"config.model.overrides.activation is {config.activation!r}; known: {sorted(ACTIVATIONS)}")
  if config.buckets < 4 or config.max_distance <= config.buckets // 2:  # else no distances are left for a logarithm
    raise ValueError(
      f"config.model.overrides: buckets is {config.buckets} and max_distance {config.max_distance}; expected 4 buckets "
      "or more, and a distance above half of their number"
    )
  parts = _parts(config)
  return Model(
    config=config,
    init=stored(partial(_init, config, parts), config.storage),
    features=partial(_features, config, parts),
    head=partial(_head, config),
    prompts=_prompts,
    prefill=partial(_prefill, config, parts),
    extend=partial(_extend, config, parts),
    paths=partial(_paths, config),
  )


def _parts(c: T5Config) -> dict[str, Pure]:
  def bias(bidirectional: bool) -> Pure:
    settings = c.buckets, c.max_distance, c.bias_stddev or c.embed_dim**-0.5, c.attention_block
    return pure(lambda r: RelativeBias(r, c.heads, bidirectional, *settings))

  return {
    "embed": pure(lambda rngs: Embedding(rngs, c.padded_vocab_size, c.embed_dim, 1.0, c.dtype)),
    "encoder": pure(partial(EncoderBlock, c)),
    "decoder": pure(partial(DecoderBlock, c)),
    "cross": pure(partial(CrossProjection, c)),
    "encoder_bias": bias(True),
    "decoder_bias": bias(False),
    "norm": pure(lambda rngs: RMSNorm(c.embed_dim, c.norm_eps)),
    "head": pure(lambda rngs: Head(rngs, c.embed_dim, c.padded_vocab_size, c.embed_dim**-0.5)),
  }


def _init(c: T5Config, parts: dict[str, Pure], key: jax.Array) -> Params:
  keys = jax.random.split(key, 6)

  def stack(name: str, layers: int, key: jax.Array, key_bias: jax.Array) -> Params:
    return {
      "layers": stack_init(parts[name], layers)(key),
      "relative_bias": parts[f"{name}_bias"].init(key_bias),
      "norm": parts["norm"].init(key),
    }

  params = {
    "embed": parts["embed"].init(keys[0]),
    "encoder": stack("encoder", c.encoder_layers, keys[1], keys[2]),
    "decoder": stack("decoder", c.decoder_layers, keys[3], keys[4]),
  }
  return params if c.tied else {**params, "head": parts["head"].init(keys[5])}


def _path(c: T5Config, queries: int, keys: int, bias: bool, training: bool, parts: int) -> str:
  asked = {"bias": bias, "dropout": training and c.dropout > 0, "parts": parts, "block": c.attention_block}
  return choose(c.attention, Call(queries, keys, c.head_dim, c.dtype, **asked))


def _paths(c: T5Config, batch: Batch, training: bool = False) -> dict[str, str]:
  encoder, decoder = (batch[f"{side}_segment_ids"].shape[1] for side in ("encoder", "decoder"))
  parts = parts_of(batch["decoder_segment_ids"])
  return {
    "encoder": _path(c, encoder, encoder, True, training, parts),
    "decoder": _path(c, decoder, decoder, True, training, parts),
    "cross": _path(c, decoder, encoder, False, training, parts),
  }


def _drop(c: T5Config, key: jax.Array | None) -> Drop | None:
  return Drop(c.dropout, key) if key is not None and c.dropout > 0 else None


def _encode(c: T5Config, parts, params: Params, tokens_BS, segments_BS, positions_BS, key=None) -> jax.Array:
  stack = params["encoder"]
  length, split = tokens_BS.shape[1], parts_of(tokens_BS)
  path = _path(c, length, length, True, key is not None, split)
  bias = parts["encoder_bias"].apply(stack["relative_bias"], length, length, parts=split)
  view = Visibility(segments_BS, segments_BS, causal=False)
  x_BSD = parts["embed"].apply(params["embed"], tokens_BS, positions_BS)
  x_BSD = dropout(x_BSD, c.dropout, fold(key, 0))

  def attend(q, k, v, key):
    return path_of(path, c.attention_block)(q, k, v, view, bias, 1.0, drop=_drop(c, key))

  def layer(x_BSD, weights, number):
    return parts["encoder"].apply(weights, x_BSD, attend, fold(key, number)), None

  numbers = 1 + jnp.arange(c.encoder_layers)
  x_BSD, _ = run_layers(layer, x_BSD, stack["layers"], numbers, c.remat, c.scan_unroll)
  return dropout(parts["norm"].apply(stack["norm"], x_BSD), c.dropout, fold(key, 1 + c.encoder_layers))


def _decode(c: T5Config, parts, params: Params, tokens_BT, positions_BT, attend, attend_cross, cache=None, key=None):
  """Runs the decoder; `attend` and `attend_cross` also get each layer's slice of the cache."""
  stack = params["decoder"]
  x_BTD = parts["embed"].apply(params["embed"], tokens_BT, positions_BT)
  x_BTD = dropout(x_BTD, c.dropout, fold(key, 0))

  def layer(x_BTD, weights, extra):
    number, cached = extra
    own, cross = partial(attend, cached=cached), partial(attend_cross, cached=cached)
    return parts["decoder"].apply(weights, x_BTD, own, cross, fold(key, number))

  extra = (1 + jnp.arange(c.decoder_layers), cache)
  x_BTD, cached = run_layers(layer, x_BTD, stack["layers"], extra, c.remat, c.scan_unroll)
  return dropout(parts["norm"].apply(stack["norm"], x_BTD), c.dropout, fold(key, 1 + c.decoder_layers)), cached


def _features(c: T5Config, parts, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
  encoder_segments, segments = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
  encoder = (batch["encoder_input_tokens"], encoder_segments, batch["encoder_positions"])
  encoded_BSD = _encode(c, parts, params, *encoder, fold(key, 0))
  length, paths = segments.shape[1], _paths(c, batch, key is not None)
  bias = parts["decoder_bias"].apply(params["decoder"]["relative_bias"], length, length, parts=parts_of(segments))
  own, cross = Visibility(segments, segments, causal=True), Visibility(segments, encoder_segments, causal=False)

  def attend(q, k, v, key, cached):
    path = path_of(paths["decoder"], c.attention_block)
    return path(q, k, v, own, bias, 1.0, drop=_drop(c, key)), {}

  def attend_cross(q, project, key, cached):
    path = path_of(paths["cross"], c.attention_block)
    return path(*named(q, *project(encoded_BSD)), cross, None, 1.0, drop=_drop(c, key)), {}

  tokens, positions = batch["decoder_input_tokens"], batch["decoder_positions"]
  return _decode(c, parts, params, tokens, positions, attend, attend_cross, key=fold(key, 1))[0]


def _head(c: T5Config, params: Params) -> jax.Array:
  w_DV = params["head"]["kernel"] if "head" in params else params["embed"]["tokens"].T
  return w_DV * c.embed_dim**-0.5 if c.scale_logits else w_DV


def _prompts(prompts: Sequence[Sequence[int]], length: int, start_id: int) -> Prompts:
  """Pads on the right for the encoder; the decoder starts from `start_id`."""
  tokens, segments = (np.zeros((len(prompts), length), np.int32) for _ in range(2))
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)] = prompt
    segments[i, : len(prompt)] = 1
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  first = np.full((len(prompts),), start_id, np.int32)
  return {"tokens": tokens, "segments": segments, "positions": positions, "first": first}


def _prefill(c: T5Config, parts, params: Params, prompts: Prompts, room: int) -> Cache:
  encoded_BSD = _encode(c, parts, params, prompts["tokens"], prompts["segments"], prompts["positions"])
  weights = params["decoder"]["layers"]["cross"]
  project = lambda w: jax.tree.map(turned, parts["cross"].apply({"cross": w}, encoded_BSD))
  keys, values = jax.lax.map(project, weights)
  # The decoder's own cache starts empty: a cross-attention key's shape with `room` slots.
  empty = jnp.zeros_like(keys[:, :, :, :1])
  empty = jnp.concatenate([empty] * room, axis=3)
  layers = {"keys": empty, "values": empty, "cross_keys": keys, "cross_values": values}
  return {"layers": layers, "rows": {"encoder_segments": prompts["segments"]}, "index": jnp.int32(0)}


def _extend(c: T5Config, parts, params: Params, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
  length, index = tokens_BT.shape[1], cache["index"]
  layers = cache["layers"]  # stacked, or a list: see `run_layers`
  room = (layers[0] if isinstance(layers, list) else layers)["keys"].shape[-2]
  bias = parts["decoder_bias"].apply(params["decoder"]["relative_bias"], length, room, index)
  ones_BT = jnp.ones_like(tokens_BT)
  own = Visibility(ones_BT, jnp.ones_like(tokens_BT, shape=(tokens_BT.shape[0], room)), causal=True, offset=index)
  cross = Visibility(ones_BT, cache["rows"]["encoder_segments"], causal=False)

  def attend(q, k, v, key, cached):
    cached = write_cache(cached, index, keys=k, values=v)
    y = ATTENTION[CACHED](q, turned(cached["keys"]), turned(cached["values"]), own, bias, 1.0)
    return y, {"keys": cached["keys"], "values": cached["values"]}

  def attend_cross(q, project, key, cached):
    keys, values = cached["cross_keys"], cached["cross_values"]
    y = ATTENTION[CACHED](q, turned(keys), turned(values), cross, None, 1.0)
    return y, {"cross_keys": keys, "cross_values": values}

  positions_BT = jnp.broadcast_to(index + jnp.arange(length), tokens_BT.shape)
  x_BTD, layers = _decode(c, parts, params, tokens_BT, positions_BT, attend, attend_cross, cache=layers)
  logits = logits_of(x_BTD, _head(c, params), c.vocab_size)
  return logits, {**cache, "layers": layers, "index": index + length}
