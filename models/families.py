"""Model families as data: how Hugging Face's config and tensor names correspond to ours, one row for each.

One table serves both directions. A tensor's row says how its dims are split and ordered, in the letters of
`models/model.py`: `"(K G H) D -> D K G H"` is a Linear's [out, in] weight there, and our query here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from models.gpt import GPTConfig
from models.rows import Row
from models.t5 import T5Config

Config = GPTConfig | T5Config


class Family(NamedTuple):
  """A family of Hugging Face's.

  Attributes:
    form: our dataclass.
    model_class: theirs, as `architectures` in config.json names it.
    prefix: what tensor names begin with; a folder written from the model without its head lacks it.
    fields: `their config -> our fields`, without `vocab_size` and `tied`.
    values: `our config -> their config's values`.
    rows: `our config -> the table`.
  """

  form: type
  model_class: str
  prefix: str
  fields: Callable[[Any], dict[str, Any]]
  values: Callable[[Any], dict[str, Any]]
  rows: Callable[[Any], list[Row]]


HEAD = "lm_head.weight"
# Tensors that hold nothing of their own: masks, rotary tables, copies of the embedding, and a leftover of old T5s.
NOTHING = (
  r"(^|\.)attn\.(masked_)?bias$|rotary_emb\.inv_freq$"
  r"|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
)
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of T5's shared.weight

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu", "relu": "relu", "gelu": "gelu_exact"}
_THEIR_ACTIVATION = {"gelu": "gelu_pytorch_tanh", "silu": "silu", "relu": "relu", "gelu_exact": "gelu"}


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise ValueError(f"the activation {name!r} is not known; known: {sorted(_ACTIVATIONS)}")
  return _ACTIVATIONS[name]


def _refuse(theirs: Any, **expected: Any) -> None:
  """Raises where their config asks for what our model does not compute."""
  for name, value in expected.items():
    got = getattr(theirs, name, None)
    if (got or None) != (value or None):
      raise ValueError(f"config.json: {theirs.model_type} with {name} = {got!r} is not supported, only {value!r}")


# --- decoder-only


def _scaling(rope: dict[str, Any]) -> tuple:
  kind = rope.get("rope_type", "default")
  if kind == "default":
    return ()
  if kind == "linear":
    return ("linear", float(rope["factor"]))
  if kind == "llama3":
    factors = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"])
    return ("llama3", *map(float, factors), int(rope["original_max_position_embeddings"]))
  raise ValueError(f"config.json: rotary scaling {kind!r} is not supported; known: default, linear, llama3")


def _rope(theta: float, scaling: tuple) -> dict[str, Any]:
  kind, *numbers = scaling or ("default",)
  names = {"linear": ("factor",)}.get(
    kind, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  )
  return {"rope_type": kind, "rope_theta": theta, **dict(zip(names, numbers, strict=False))}


def _windows(theirs: Any) -> dict[str, Any]:
  """Returns the window, and the shortest pattern that gives the layers' types."""
  types = getattr(theirs, "layer_types", None) or ["sliding_attention"]  # Mistral: every layer
  known = {"sliding_attention": "l", "full_attention": "g"}
  if set(types) - set(known):
    raise ValueError(f"config.json: layer_types has {sorted(set(types) - set(known))}; supported are {list(known)}")
  letters = "".join(known[kind] for kind in types)
  if not theirs.sliding_window or "l" not in letters:
    return {}
  fits = (n for n in range(1, len(letters) + 1) if all(c == letters[i % n] for i, c in enumerate(letters)))
  return {"window": theirs.sliding_window, "pattern": letters[: next(fits)]}


def _decoder_fields(theirs: Any) -> dict[str, Any]:
  """What Llama, Mistral, Qwen and Gemma say in the same words."""
  rope = theirs.rope_parameters
  rope = rope.get("full_attention", rope)
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(f"config.json: rotary embedding of a part of a head is not supported, got {rope}")
  return {
    "layers": theirs.num_hidden_layers,
    "embed_dim": theirs.hidden_size,
    "heads": theirs.num_attention_heads,
    "kv_heads": theirs.num_key_value_heads,
    "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
    "mlp_dim": theirs.intermediate_size,
    "norm_eps": theirs.rms_norm_eps,
    "max_length": theirs.max_position_embeddings,
    "activation": _activation(getattr(theirs, "hidden_activation", None) or theirs.hidden_act),
    "rope_theta": float(rope["rope_theta"]),
    "rope_scaling": _scaling(rope),
  }


def _decoder_values(c: GPTConfig) -> dict[str, Any]:
  values = {
    "num_hidden_layers": c.layers,
    "hidden_size": c.embed_dim,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "intermediate_size": c.mlp_dim,
    "rms_norm_eps": c.norm_eps,
    "hidden_act": _THEIR_ACTIVATION[c.activation],
    "rope_parameters": _rope(c.rope_theta, c.rope_scaling),
    "tie_word_embeddings": c.tied,
    "sliding_window": c.window or None,
  }
  return values | ({"max_position_embeddings": c.max_length} if c.max_length else {})


def _llama_fields(theirs: Any) -> dict[str, Any]:
  _refuse(theirs, attention_bias=False, mlp_bias=False)
  return _decoder_fields(theirs)


def _mistral_fields(theirs: Any) -> dict[str, Any]:
  return {**_decoder_fields(theirs), **_windows(theirs)}


def _qwen2_fields(theirs: Any) -> dict[str, Any]:
  return {**_mistral_fields(theirs), "bias": "qkv"}


def _qwen3_fields(theirs: Any) -> dict[str, Any]:
  _refuse(theirs, attention_bias=False)
  return {**_mistral_fields(theirs), "qk_norm": True}


def _qwen_values(c: GPTConfig) -> dict[str, Any]:
  values = {"use_sliding_window": c.window > 0, "max_window_layers": 0, "layer_types": _layer_types(c)}
  return {**_decoder_values(c), **values}


def _layer_types(c: GPTConfig) -> list[str]:
  return ["sliding_attention" if local else "full_attention" for local in c.local.tolist()]


def _gemma_fields(theirs: Any) -> dict[str, Any]:
  _refuse(theirs, attention_bias=False, use_bidirectional_attention=False)
  return {**_decoder_fields(theirs), "norm": "rmsnorm_plus_one", "scale_embedding": True}


def _gemma2_fields(theirs: Any) -> dict[str, Any]:
  return {
    **_gemma_fields(theirs),
    **_windows(theirs),
    "post_norms": True,
    "attention_scale": theirs.query_pre_attn_scalar**-0.5,
    "attention_cap": theirs.attn_logit_softcapping or 0.0,
    "logit_cap": theirs.final_logit_softcapping or 0.0,
  }


def _gemma3_fields(theirs: Any) -> dict[str, Any]:
  local = theirs.rope_parameters["sliding_attention"]
  if _scaling(local):
    raise ValueError(f"config.json: gemma3 with scaled rotary angles in sliding layers is not supported, got {local}")
  return {**_gemma2_fields(theirs), "qk_norm": True, "local_rope_theta": float(local["rope_theta"])}


def _gemma2_values(c: GPTConfig) -> dict[str, Any]:
  values = _decoder_values(c)
  return {
    **values,
    "hidden_activation": values["hidden_act"],
    "query_pre_attn_scalar": round((c.attention_scale or c.head_dim**-0.5) ** -2),
    "attn_logit_softcapping": c.attention_cap or None,
    "final_logit_softcapping": c.logit_cap or None,
    "layer_types": _layer_types(c),
  }


def _gemma3_values(c: GPTConfig) -> dict[str, Any]:
  rope = {
    "full_attention": _rope(c.rope_theta, c.rope_scaling),
    "sliding_attention": _rope(c.local_rope_theta or c.rope_theta, ()),
  }
  return {**_gemma2_values(c), "rope_parameters": rope}


def _decoder_rows(c: GPTConfig) -> list[Row]:
  layer, there = "layers/", "model.layers.{}."
  mlp_norm = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
  rows = [
    Row("embed/tokens", "model.embed_tokens.weight", "V D"),
    Row("norm/scale", "model.norm.weight", "D"),
    Row(layer + "attention_norm/scale", there + "input_layernorm.weight", "D"),
    Row(layer + "mlp_norm/scale", f"{there}{mlp_norm}.weight", "D"),
    Row(layer + "attention/query", there + "self_attn.q_proj.weight", "(K G H) D -> D K G H"),
    Row(layer + "attention/key", there + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Row(layer + "attention/value", there + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Row(layer + "attention/out", there + "self_attn.o_proj.weight", "D (K G H) -> K G H D"),
    Row(layer + "mlp/gate", there + "mlp.gate_proj.weight", "F D -> D F"),
    Row(layer + "mlp/up", there + "mlp.up_proj.weight", "F D -> D F"),
    Row(layer + "mlp/down", there + "mlp.down_proj.weight", "D F -> F D"),
  ]
  if c.bias == "qkv":
    rows += [
      Row(layer + "attention/query_bias", there + "self_attn.q_proj.bias", "(K G H) -> K G H"),
      Row(layer + "attention/key_bias", there + "self_attn.k_proj.bias", "(K H) -> K H"),
      Row(layer + "attention/value_bias", there + "self_attn.v_proj.bias", "(K H) -> K H"),
    ]
  if c.qk_norm:
    rows += [
      Row(layer + "attention/query_norm/scale", there + "self_attn.q_norm.weight", "H"),
      Row(layer + "attention/key_norm/scale", there + "self_attn.k_norm.weight", "H"),
    ]
  if c.post_norms:
    rows += [
      Row(layer + "attention_post_norm/scale", there + "post_attention_layernorm.weight", "D"),
      Row(layer + "mlp_post_norm/scale", there + "post_feedforward_layernorm.weight", "D"),
    ]
  return rows if c.tied else [*rows, Row("head/kernel", HEAD, "V D -> D V")]


def _gpt2_fields(theirs: Any) -> dict[str, Any]:
  _refuse(theirs, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, scale_attn_weights=True)
  return {
    "layers": theirs.n_layer,
    "embed_dim": theirs.n_embd,
    "heads": theirs.n_head,
    "kv_heads": theirs.n_head,
    "head_dim": theirs.n_embd // theirs.n_head,
    "mlp_dim": theirs.n_inner or 4 * theirs.n_embd,
    "norm": "layernorm",
    "norm_eps": theirs.layer_norm_epsilon,
    "positions": "learned",
    "max_length": theirs.n_positions,
    "activation": _activation(theirs.activation_function),
    "gated": False,
    "bias": "all",
  }


def _gpt2_values(c: GPTConfig) -> dict[str, Any]:
  return {
    "n_layer": c.layers,
    "n_embd": c.embed_dim,
    "n_head": c.heads,
    "n_inner": c.mlp_dim,
    "layer_norm_epsilon": c.norm_eps,
    "n_positions": c.max_length,
    "activation_function": "gelu_new" if c.activation == "gelu" else _THEIR_ACTIVATION[c.activation],
    "tie_word_embeddings": c.tied,
  }


def _gpt2_rows(c: GPTConfig) -> list[Row]:
  layer, there = "layers/", "transformer.h.{}."
  rows = [
    Row("embed/tokens", "transformer.wte.weight", "V D"),
    Row("embed/positions", "transformer.wpe.weight", "T D"),
    *_with_bias("norm", "transformer.ln_f"),
    *_with_bias(layer + "attention_norm", there + "ln_1"),
    *_with_bias(layer + "mlp_norm", there + "ln_2"),
    Row(layer + "attention/query", there + "attn.c_attn.weight", "D (K G H) -> D K G H", (0, 3)),
    Row(layer + "attention/key", there + "attn.c_attn.weight", "D (K H) -> D K H", (1, 3)),
    Row(layer + "attention/value", there + "attn.c_attn.weight", "D (K H) -> D K H", (2, 3)),
    Row(layer + "attention/query_bias", there + "attn.c_attn.bias", "(K G H) -> K G H", (0, 3)),
    Row(layer + "attention/key_bias", there + "attn.c_attn.bias", "(K H) -> K H", (1, 3)),
    Row(layer + "attention/value_bias", there + "attn.c_attn.bias", "(K H) -> K H", (2, 3)),
    Row(layer + "attention/out", there + "attn.c_proj.weight", "(K G H) D -> K G H D"),
    Row(layer + "attention/out_bias", there + "attn.c_proj.bias", "D"),
    Row(layer + "mlp/up", there + "mlp.c_fc.weight", "D F"),
    Row(layer + "mlp/up_bias", there + "mlp.c_fc.bias", "F"),
    Row(layer + "mlp/down", there + "mlp.c_proj.weight", "F D"),
    Row(layer + "mlp/down_bias", there + "mlp.c_proj.bias", "D"),
  ]
  return rows if c.tied else [*rows, Row("head/kernel", HEAD, "V D -> D V")]


def _with_bias(ours: str, theirs: str) -> list[Row]:
  return [Row(f"{ours}/scale", f"{theirs}.weight", "D"), Row(f"{ours}/bias", f"{theirs}.bias", "D")]


# --- encoder-decoder


def _t5_fields(theirs: Any) -> dict[str, Any]:
  return {
    "encoder_layers": theirs.num_layers,
    "decoder_layers": theirs.num_decoder_layers,
    "embed_dim": theirs.d_model,
    "heads": theirs.num_heads,
    "head_dim": theirs.d_kv,
    "mlp_dim": theirs.d_ff,
    "activation": _activation(theirs.dense_act_fn),
    "gated": theirs.is_gated_act,
    "scale_logits": getattr(theirs, "scale_decoder_outputs", False),  # mT5 never scales
    "norm_eps": theirs.layer_norm_epsilon,
    "buckets": theirs.relative_attention_num_buckets,
    "max_distance": theirs.relative_attention_max_distance,
  }


def _t5_values(c: T5Config) -> dict[str, Any]:
  # "gated-gelu" means the tanh form there; elsewhere "gelu" is the exact one.
  name = {"gelu": "gelu" if c.gated else "gelu_new", "gelu_exact": "gelu"}.get(c.activation, c.activation)
  return {
    "num_layers": c.encoder_layers,
    "num_decoder_layers": c.decoder_layers,
    "d_model": c.embed_dim,
    "num_heads": c.heads,
    "d_kv": c.head_dim,
    "d_ff": c.mlp_dim,
    "feed_forward_proj": f"gated-{name}" if c.gated else name,
    "layer_norm_epsilon": c.norm_eps,
    "relative_attention_num_buckets": c.buckets,
    "relative_attention_max_distance": c.max_distance,
    "tie_word_embeddings": c.scale_logits,  # there the flag only says whether to scale
    "dropout_rate": c.dropout,
  }


def _t5_rows(c: T5Config) -> list[Row]:
  rows = [Row("embed/tokens", "shared.weight", "V D")]
  for stack, parts in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross", "mlp"))):
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows += [
      Row(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight", "D"),
      Row(f"{stack}/relative_bias/table", bias, "E (K G) -> E K G"),
    ]
    for number, part in enumerate(parts):
      here, there = f"{stack}/layers/{part}", f"{stack}.block.{{}}.layer.{number}."
      rows.append(Row(f"{here}_norm/scale", there + "layer_norm.weight", "D"))
      rows += _t5_mlp(c, here, there) if part == "mlp" else _t5_attention(here, there, part)
  return rows if c.tied else [*rows, Row("head/kernel", HEAD, "V D -> D V")]


def _t5_attention(here: str, there: str, part: str) -> list[Row]:
  there += "SelfAttention." if part == "attention" else "EncDecAttention."
  return [
    Row(f"{here}/query", there + "q.weight", "(K G H) D -> D K G H"),
    Row(f"{here}/key", there + "k.weight", "(K H) D -> D K H"),
    Row(f"{here}/value", there + "v.weight", "(K H) D -> D K H"),
    Row(f"{here}/out", there + "o.weight", "D (K G H) -> K G H D"),
  ]


def _t5_mlp(c: T5Config, here: str, there: str) -> list[Row]:
  there += "DenseReluDense."
  gate = [Row(f"{here}/gate", there + "wi_0.weight", "F D -> D F")] if c.gated else []
  up = Row(f"{here}/up", there + ("wi_1.weight" if c.gated else "wi.weight"), "F D -> D F")
  return [*gate, up, Row(f"{here}/down", there + "wo.weight", "D F -> F D")]


# By `model_type`. An export takes the first one that can say all that the config says.
FAMILIES: dict[str, Family] = {
  "gpt2": Family(GPTConfig, "GPT2LMHeadModel", "transformer.", _gpt2_fields, _gpt2_values, _gpt2_rows),
  "llama": Family(GPTConfig, "LlamaForCausalLM", "model.", _llama_fields, _decoder_values, _decoder_rows),
  "mistral": Family(GPTConfig, "MistralForCausalLM", "model.", _mistral_fields, _decoder_values, _decoder_rows),
  "qwen2": Family(GPTConfig, "Qwen2ForCausalLM", "model.", _qwen2_fields, _qwen_values, _decoder_rows),
  "qwen3": Family(GPTConfig, "Qwen3ForCausalLM", "model.", _qwen3_fields, _qwen_values, _decoder_rows),
  "gemma": Family(GPTConfig, "GemmaForCausalLM", "model.", _gemma_fields, _decoder_values, _decoder_rows),
  "gemma2": Family(GPTConfig, "Gemma2ForCausalLM", "model.", _gemma2_fields, _gemma2_values, _decoder_rows),
  "gemma3_text": Family(GPTConfig, "Gemma3ForCausalLM", "model.", _gemma3_fields, _gemma3_values, _decoder_rows),
  "t5": Family(T5Config, "T5ForConditionalGeneration", "", _t5_fields, _t5_values, _t5_rows),
  "mt5": Family(T5Config, "MT5ForConditionalGeneration", "", _t5_fields, _t5_values, _t5_rows),
}


def meaning(c: Config) -> dict[str, Any]:
  """Returns what a config computes: two with the same meaning give the same logits from the same parameters."""
  fields = dataclasses.asdict(c)
  how = ("dtype", "storage", "remat", "scan_unroll", "attention", "attention_block")
  for name in (*how, "dropout", "max_length", "bias_stddev"):
    fields.pop(name, None)
  if isinstance(c, GPTConfig):
    fields["attention_scale"] = c.attention_scale or c.head_dim**-0.5
    fields["pattern"] = tuple(c.local.tolist())
    scaled = (c.rope_theta, c.rope_scaling)
    rope = (scaled, (c.local_rope_theta, ()) if c.local_rope_theta else scaled)
    rope = (rope[0] if not c.local.all() else None, rope[1] if c.local.any() else None)
    for name in ("rope_theta", "rope_scaling", "local_rope_theta"):
      del fields[name]
    fields["rope"] = rope if c.positions == "rotary" else None
  return fields
