"""A decoder-only transformer: GPT-2, Llama, Mistral, Qwen and Gemma are rows of one table.

Axis letters: see `models/model.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import (
  CACHED,
  FIXED_WINDOW,
  Attention,
  Call,
  Rotation,
  choose,
  named,
  path_of,
  rotary_frequencies,
  rotate,
  rotation,
)
from models.layers import ACTIVATIONS, NORMS, Embedding, Head, Mlp, dropout, fold, run_layers
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
class GPTConfig:
  """Shape and choices of a decoder-only model.

  Attributes:
    vocab_size: the tokenizer's.
    layers, embed_dim, heads, kv_heads, head_dim, mlp_dim: sizes; `heads` is a multiple of `kv_heads`.
    norm: a name in `NORMS`. norm_eps: its epsilon. post_norms: a norm after attention and after the MLP, too (Gemma 2).
    qk_norm: a norm over each head's query and key (Qwen 3, Gemma 3).
    positions: "rotary", or "learned" (then no more than `max_length` of them).
    max_length: longest sequence that the model is made for; 0 = not said.
    activation: a name in `ACTIVATIONS`; gated: whether the MLP multiplies by a gate.
    bias: which projections have one: "none", "qkv" (Qwen 2) or "all" (GPT-2, the MLP's too).
    tied: the output matrix is the embedding's. scale_embedding: token vectors times the root of `embed_dim` (Gemma).
    rope_theta: rotary wavelength base; local_rope_theta: of layers with a window, 0 = the same (Gemma 3).
    rope_scaling: see `rotary_frequencies`; layers with a window are not scaled where they have a base of their own.
    attention_scale: of attention logits; 0 = `head_dim`^-0.5. attention_cap, logit_cap: soft caps, 0 = none (Gemma 2).
    window: keys that a layer with a window sees; pattern: layers with ("l", local) and without one ("g", global), from
      the first on and over again: "g", "l" (Mistral), "lg" (Gemma 2), "lllllg" (Gemma 3).
    dropout: rate on the embedding and on each residual branch; GPT-2's (learned positions) on attention weights, too.
    dtype, storage, remat, scan_unroll, attention, attention_block: see configs/base.py `model`.
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
  bias: str = "none"
  tied: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  scale_embedding: bool = False
  rope_theta: float = 10_000.0
  local_rope_theta: float = 0.0
  rope_scaling: tuple = ()
  attention_scale: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  window: int = 0
  pattern: str = "g"
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

  @property
  def local(self) -> np.ndarray:
    """Which layers have a window, bool [L]."""
    return np.array([self.pattern[i % len(self.pattern)] == "l" for i in range(self.layers)])


def _sizes(layers: int, embed_dim: int, heads: int, kv_heads: int, mlp_dim: int, **rest) -> dict:
  sizes = {"layers": layers, "embed_dim": embed_dim, "heads": heads, "kv_heads": kv_heads, "mlp_dim": mlp_dim}
  return {"head_dim": embed_dim // heads, **sizes, **rest}


_GPT2 = {
  "norm": "layernorm",
  "positions": "learned",
  "max_length": 1024,
  "activation": "gelu",
  "gated": False,
  "bias": "all",
  "tied": True,
}
_GEMMA2 = {
  "norm": "rmsnorm_plus_one",
  "norm_eps": 1e-6,
  "post_norms": True,
  "activation": "gelu",
  "tied": True,
  "scale_embedding": True,
  "head_dim": 256,
  "attention_scale": 256**-0.5,
}
_GEMMA3 = {**_GEMMA2, "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4, "pattern": "lllllg"}
_GEMMA2 |= {"attention_cap": 50.0, "logit_cap": 30.0, "window": 4096, "pattern": "lg"}
_LLAMA31 = {"rope_theta": 500_000.0, "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 8192)}
_LLAMA32 = {"rope_theta": 500_000.0, "rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192), "tied": True}
_QWEN2 = {"norm_eps": 1e-6, "rope_theta": 1e6, "bias": "qkv"}
_QWEN3 = {"norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": True, "head_dim": 128}
SIZES: dict[str, dict] = {
  "custom": {},  # every field from config.model.overrides, as for imported weights
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
  "llama3.1-8b": _sizes(32, 4096, 32, 8, 14336, **_LLAMA31),
  "llama3.2-1b": _sizes(16, 2048, 32, 8, 8192, **_LLAMA32),
  "mistral-7b": _sizes(32, 4096, 32, 8, 14336, window=4096, pattern="l"),
  "qwen2.5-0.5b": _sizes(24, 896, 14, 2, 4864, tied=True, **_QWEN2),
  "qwen2.5-7b": _sizes(28, 3584, 28, 4, 18944, **_QWEN2),
  "qwen3-0.6b": _sizes(28, 1024, 16, 8, 3072, tied=True, **_QWEN3),
  "qwen3-8b": _sizes(36, 4096, 32, 8, 12288, **_QWEN3),
  "gemma2-2b": _sizes(26, 2304, 8, 4, 9216, **_GEMMA2),
  "gemma2-9b": _sizes(42, 3584, 16, 8, 14336, **_GEMMA2),
  "gemma3-270m": _sizes(18, 640, 4, 1, 2048, window=512, **_GEMMA3),
  "gemma3-1b": _sizes(26, 1152, 4, 1, 6912, window=512, **_GEMMA3),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Params]]
_FAR = 2**30  # a window that hides nothing, where layers with and without one run in one loop


class Block(nnx.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
    c = config
    # By fan-in, so that small models start as well as large ones (GPT-2's 0.02 is fan-in at 2500); branches that add to
    # the residual stream are scaled down by their number, as GPT-2's are.
    into, branches = c.embed_dim**-0.5, (2 * c.layers) ** -0.5
    norm = partial(NORMS[c.norm], eps=c.norm_eps)
    self.attention_norm, self.mlp_norm = norm(c.embed_dim), norm(c.embed_dim)
    if c.post_norms:
      self.attention_post_norm, self.mlp_post_norm = norm(c.embed_dim), norm(c.embed_dim)
    heads = (c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    stddevs = (into, into, (c.heads * c.head_dim) ** -0.5 * branches)
    self.attention = Attention(rngs, c.embed_dim, *heads, stddevs, c.bias, norm if c.qk_norm else None)
    mlp_stddevs = (into, c.mlp_dim**-0.5 * branches)
    self.mlp = Mlp(rngs, c.embed_dim, c.mlp_dim, c.activation, c.gated, c.bias == "all", mlp_stddevs)
    self.config = c

  def __call__(self, x_BTD: jax.Array, turn: Rotation | None, attend: Attend, key: jax.Array | None):
    c = self.config
    y_BTD = self.attention_norm(x_BTD)
    q, (k, v) = self.attention.queries(y_BTD), self.attention.keys_values(y_BTD)
    if turn is not None:
      q, k = rotate(q, turn), rotate(k, turn)
    keys = (None, None) if key is None else jax.random.split(key)
    y_BTKGH, cached = attend(*named(q, k, v), fold(keys[0], 1))
    y_BTD = self.attention.output(y_BTKGH)
    x_BTD += dropout(self.attention_post_norm(y_BTD) if c.post_norms else y_BTD, c.dropout, keys[0])
    y_BTD = self.mlp(self.mlp_norm(x_BTD))
    x_BTD += dropout(self.mlp_post_norm(y_BTD) if c.post_norms else y_BTD, c.dropout, keys[1])
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
    ValueError: unknown size, field or choice, or heads that do not divide.
  """
  if size not in SIZES:
    raise ValueError(f"config.model.size is {size!r}; sizes of gpt are {sorted(SIZES)}")
  config = make_config(GPTConfig, {**SIZES[size], **fields, "vocab_size": vocab_size})
  _check(config)
  parts = _parts(config)
  return Model(
    config=config,
    init=stored(partial(_init, parts), config.storage),
    features=partial(_features, config, parts),
    head=_head,
    prompts=_prompts,
    prefill=partial(_prefill, config, parts),
    extend=partial(_extend, config, parts),
    paths=partial(_paths, config),
    logit_cap=config.logit_cap,
  )


def _check(c: GPTConfig) -> None:
  if c.heads % c.kv_heads:
    raise ValueError(f"heads ({c.heads}) must be a multiple of kv_heads ({c.kv_heads})")
  known = {"norm": NORMS, "positions": ("rotary", "learned"), "activation": ACTIVATIONS, "bias": ("none", "qkv", "all")}
  for name, names in known.items():
    if getattr(c, name) not in names:
      raise ValueError(f"config.model.overrides.{name} is {getattr(c, name)!r}; known: {sorted(names)}")
  if not c.pattern or set(c.pattern) - {"l", "g"} or ("l" in c.pattern) != (c.window > 0):
    raise ValueError(
      f"pattern {c.pattern!r} and window {c.window} do not agree: 'l' stands for a layer with a window, 'g' for one "
      "without, and a window has 1 or more keys"
    )
  if c.positions == "learned" and c.max_length < 1:
    raise ValueError(f"positions are 'learned' and max_length is {c.max_length}; expected how many there are")
  if c.positions == "rotary":
    if c.head_dim % 2:
      raise ValueError(f"head_dim is {c.head_dim}; rotary positions turn pairs of dims: expected an even number")
    rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)  # refuses an unknown scaling


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


def _turns(c: GPTConfig, positions_BT: jax.Array) -> tuple[Rotation | None, Rotation | None]:
  """Returns the rotary angles of layers, and those of layers with a window where they have a base of their own."""
  if c.positions == "learned":
    return None, None
  everywhere = rotation(positions_BT, rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
  if not c.local_rope_theta:
    return everywhere, None
  return everywhere, rotation(positions_BT, rotary_frequencies(c.head_dim, c.local_rope_theta))


def _run(c: GPTConfig, parts, params: Params, tokens_BT, positions_BT, attend, cache=None, key=None):
  """Embeds, runs the layers and the last norm.

  `attend(q, k, v, key, cached, is_local)` gets each layer's slice of the cache, and whether it has a window: a bool, or
  an array where layers with and without one run in one loop.
  """
  x_BTD = parts["embed"].apply(params["embed"], tokens_BT, positions_BT)
  x_BTD = x_BTD * c.embed_dim**0.5 if c.scale_embedding else x_BTD
  x_BTD = dropout(x_BTD, c.dropout, fold(key, c.layers))
  everywhere, local = _turns(c, positions_BT)  # made once, not in every layer
  mixed = 0 < c.local.sum() < c.layers

  def layer(x_BTD, weights, extra):
    number, is_local, cached = extra
    turn = everywhere if local is None else jax.tree.map(partial(jnp.where, is_local), local, everywhere)
    see = partial(attend, cached=cached, is_local=is_local if mixed else bool(c.local.any()))
    return parts["layers"].apply(weights, x_BTD, turn, see, fold(key, number))

  extra = (jnp.arange(c.layers), jnp.asarray(c.local), cache)
  x_BTD, cached = run_layers(layer, x_BTD, params["layers"], extra, c.remat, c.scan_unroll)
  return parts["norm"].apply(params["norm"], x_BTD), cached


def _attention(c: GPTConfig, path: str, q, k, v, view: Visibility, is_local: jax.Array | bool, key=None) -> jax.Array:
  scale = c.attention_scale or c.head_dim**-0.5
  drop = Drop(c.dropout, key) if _drops_weights(c, key is not None) else None
  attend = path_of(path, c.attention_block)

  def run(window: jax.Array | int) -> jax.Array:
    return attend(q, k, v, view._replace(window=window), None, scale, c.attention_cap, drop)

  if isinstance(is_local, bool):
    return run(c.window if is_local else 0)
  if path in FIXED_WINDOW:
    return jax.lax.cond(is_local, lambda: run(c.window), lambda: run(0))
  return run(jnp.where(is_local, c.window, _FAR))


def _drops_weights(c: GPTConfig, training: bool) -> bool:
  return training and c.dropout > 0 and c.positions == "learned"


def _paths(c: GPTConfig, batch: Batch, training: bool = False) -> dict[str, str]:
  length, prefix = batch["decoder_segment_ids"].shape[1], batch.get("decoder_bidirectional") is not None
  asked = {"prefix": prefix, "cap": c.attention_cap > 0, "dropout": _drops_weights(c, training)}
  asked |= {"parts": parts_of(batch["decoder_segment_ids"]), "block": c.attention_block}
  call = Call(length, length, c.head_dim, c.dtype, **asked)
  return {"decoder": choose(c.attention, call)}


def _features(c: GPTConfig, parts, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
  segments_BT, path = batch["decoder_segment_ids"], _paths(c, batch, key is not None)["decoder"]
  view = Visibility(segments_BT, segments_BT, causal=True, bidirectional_BT=batch.get("decoder_bidirectional"))

  def attend(q, k, v, key, cached, is_local):
    return _attention(c, path, q, k, v, view, is_local, key), None

  tokens, positions = batch["decoder_input_tokens"], batch["decoder_positions"]
  return _run(c, parts, params, tokens, positions, attend, key=key)[0]


def _head(params: Params) -> jax.Array:
  return params["head"]["kernel"] if "head" in params else params["embed"]["tokens"].T


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
  tokens, segments_BS, positions, extra = prompts["tokens"], prompts["segments"], prompts["positions"], 0
  count_B = jnp.sum(segments_BS, axis=1, dtype=jnp.int32)
  if "bidirectional" in prompts:
    # All of a prompt sees its last token, so that is read here, too; `extend` reads it again and changes nothing.
    first_B1, extra = prompts["first"][:, None], 1
    tokens = jnp.concatenate([tokens, first_B1], axis=1)
    segments_BS = jnp.concatenate([segments_BS, jnp.ones_like(first_B1)], axis=1)
    positions = jnp.concatenate([positions, count_B[:, None]], axis=1)
  view = Visibility(segments_BS, segments_BS, causal=True, bidirectional_BT=segments_BS if extra else None)
  read = {"decoder_segment_ids": segments_BS} | ({"decoder_bidirectional": segments_BS} if extra else {})
  path = _paths(c, read)["decoder"]

  def attend(q, k, v, key, cached, is_local):
    widths = ((0, 0), (0, 0), (0, room - extra), (0, 0))
    cached = {"keys": jnp.pad(turned(k), widths), "values": jnp.pad(turned(v), widths)}
    return _attention(c, path, q, k, v, view, is_local), cached

  _, layers = _run(c, parts, params, tokens, positions, attend)
  segments = jnp.pad(segments_BS, ((0, 0), (0, room - extra)), constant_values=1)
  rows = {"segments": segments, "position": count_B}
  return {"layers": layers, "rows": rows, "index": jnp.int32(prompts["segments"].shape[1])}


def _extend(c: GPTConfig, parts, params: Params, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
  length, index = tokens_BT.shape[1], cache["index"]
  view = Visibility(jnp.ones_like(tokens_BT), cache["rows"]["segments"], causal=True, offset=index)

  def attend(q, k, v, key, cached, is_local):
    cached = write_cache(cached, index, keys=k, values=v)
    return _attention(c, CACHED, q, turned(cached["keys"]), turned(cached["values"]), view, is_local), cached

  positions_BT = cache["rows"]["position"][:, None] + jnp.arange(length)
  x_BTD, layers = _run(c, parts, params, tokens_BT, positions_BT, attend, cache=cache["layers"])
  rows = {**cache["rows"], "position": cache["rows"]["position"] + length}
  logits = logits_of(x_BTD, _head(params), c.vocab_size, c.logit_cap)
  return logits, {"layers": layers, "rows": rows, "index": index + length}
