"""Parity with transformers, family by family: logits, greedy text, every byte of every tensor, both ways."""

import jax
import numpy as np
import pytest

from models import MODELS, beam, decode, hf, hf_export
from models.families import FAMILIES
from models.sharding import on_mesh
from models.weights import open_tensors

torch = pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
import transformers  # noqa: E402  slow, and of no use without torch

VOCAB = 99
_GPT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_GPT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 128}
_GPT |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_T5 |= {"vocab_size": VOCAB, "decoder_start_token_id": 0}
IDS = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
_ROPE3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE3 |= {"original_max_position_embeddings": 32}
# name -> (model_type, their settings, whether the head is its own though their config says tied)
CASES = {
  "t5-v1.0": ("t5", {**_T5, "feed_forward_proj": "relu"}, False),
  "t5-v1.1": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
  "byt5": ("t5", {**_T5, "num_layers": 3, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"}, True),
  "ul2": ("t5", {**_T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, True),
  "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu"}, True),
  "gpt2": ("gpt2", {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB}, False),
  "llama2": ("llama", {**_GPT, "num_key_value_heads": 4}, False),
  "llama3": ("llama", {**_GPT, "rope_parameters": _ROPE3}, False),
  "smollm": ("llama", {**_GPT, "tie_word_embeddings": True}, False),
  "mistral": ("mistral", {**_GPT, "sliding_window": 5}, False),
  "qwen2.5": ("qwen2", _GPT, False),
  "qwen2.5-tied": ("qwen2", {**_GPT, "tie_word_embeddings": True}, False),
  "qwen3": ("qwen3", _GPT, False),
  "gemma": ("gemma", _GPT, False),
  "gemma2": (
    "gemma2",
    {**_GPT, "sliding_window": 5, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0},
    False,
  ),
  "gemma3": ("gemma3_text", {**_GPT, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 12}, False),
}
CASES["gemma3"][1]["rope_parameters"] = {
  "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
  "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34]]


def reference(name: str):
  """A tiny model of theirs with every value different, in evaluation mode."""
  kind, settings, own_head = CASES[name]
  config = transformers.AutoConfig.for_model(kind, **settings, attn_implementation="eager")
  model = getattr(transformers, FAMILIES[kind].model_class)(config).eval()
  if own_head:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  random = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random) + 0.05)
  return model


def load(folder):
  """Reads a folder onto one device."""
  found = hf.describe(folder)
  model = MODELS[found.architecture]("custom", found.vocab_size, **found.fields)
  return model, hf.load(folder, model, jax.sharding.get_mesh())


def packed(architecture: str, prompts):
  """Prompts as they are, [start, …] in one row each: (batch, real positions of the decoder)."""
  length = max(map(len, prompts))
  tokens = np.array([[*p, *[0] * (length - len(p))] for p in prompts], np.int32)
  segments = np.array([[*[1] * len(p), *[0] * (length - len(p))] for p in prompts], np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  side = {"input_tokens": tokens, "segment_ids": segments, "positions": positions}
  batch = {f"decoder_{key}": value for key, value in side.items()}
  return batch | ({f"encoder_{key}": value for key, value in side.items()} if architecture == "t5" else {})


def our_logits(model, params, batch) -> np.ndarray:
  def run(params, batch):
    logits = model.features(params, batch) @ model.head(params)
    return model.logit_cap * jax.numpy.tanh(logits / model.logit_cap) if model.logit_cap else logits

  return np.asarray(jax.jit(run)(params, on_mesh(batch)))[..., : model.config.vocab_size]


def their_logits(model, architecture: str, batch) -> np.ndarray:
  of = lambda key: torch.tensor(np.asarray(batch[key])).long()  # noqa: E731
  inputs = {"attention_mask": of("decoder_segment_ids")}
  if architecture == "t5":
    inputs = {"input_ids": of("encoder_input_tokens"), "attention_mask": of("encoder_segment_ids")}
    inputs |= {"decoder_input_ids": of("decoder_input_tokens")}
  else:
    inputs |= {"input_ids": of("decoder_input_tokens"), "position_ids": of("decoder_positions")}
  with torch.no_grad():
    return model(**inputs).logits.numpy()


def their_text(model, architecture: str, prompts, count: int, left: bool) -> list[list[int]]:
  length = max(map(len, prompts))
  gap = [[0] * (length - len(prompt)) for prompt in prompts]
  rows = [[*g, *p] if left else [*p, *g] for g, p in zip(gap, prompts, strict=True)]
  mask = [[*g, *[1] * len(p)] if left else [*[1] * len(p), *g] for g, p in zip(gap, prompts, strict=True)]
  settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
  ids = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), eos_token_id=-1, **settings)
  return ids[:, 1 if architecture == "t5" else length :].tolist()


def our_text(model, params, prompts, count: int) -> list[list[int]]:
  """Greedy tokens after prompts whose first token is what a decoder-only row starts from."""
  if "encoder" not in params:
    given = [prompt[1:] for prompt in prompts]
    starts = {prompt[0] for prompt in prompts}
    assert len(starts) == 1
  else:
    given, starts = prompts, {0}
  rows = model.prompts(given, max(map(len, given)) + 3, starts.pop())
  run = jax.jit(lambda p, x: decode.write(model, p, x, room=count, eos_id=10_000, pad_id=0))
  return np.asarray(run(params, on_mesh(rows))).tolist()


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path, one_device):
  theirs = reference(name)
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = load(tmp_path / "theirs")
  architecture = hf.describe(tmp_path / "theirs").architecture
  batch = packed(architecture, PROMPTS)
  real = batch["decoder_segment_ids"] == 1
  expected = their_logits(theirs, architecture, batch)
  np.testing.assert_allclose(our_logits(model, params, batch)[real], expected[real], atol=1e-4)

  (tmp_path / "ours").mkdir()
  kind, config = hf_export.their_config(model.config, "float32", 128, IDS)
  hf_export.save_config(tmp_path / "ours", config, model.config)
  hf_export.save(tmp_path / "ours", kind, model.config, params, "float32", hf_export.FILE_BYTES)
  given, made = (open_tensors(tmp_path / folder) for folder in ("theirs", "ours"))
  assert set(made) <= set(given) and {given[k].name for k in set(given) - set(made)} <= {"lm_head.weight"}
  for key in made:
    assert made[key].shape == given[key].shape
    assert made[key].rows(0, made[key].shape[0]).tobytes() == given[key].rows(0, given[key].shape[0]).tobytes(), key

  model_class = getattr(transformers, FAMILIES[kind].model_class)
  again, info = model_class.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager", local_files_only=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  np.testing.assert_array_equal(their_logits(again.eval(), architecture, batch)[real], expected[real])

  prompts = [[2, *prompt] for prompt in PROMPTS]
  ours = our_text(model, params, prompts, 50)
  for left in (True, False) if architecture == "t5" else (True,):
    assert their_text(again, architecture, prompts, 50, left) == ours
  if architecture == "gpt":  # padding on the right: theirs one by one
    assert [their_text(again, architecture, [prompt], 50, True)[0] for prompt in prompts] == ours


def test_every_family_has_a_case():
  assert {kind for kind, _, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["gpt2", "t5-v1.1"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_are_theirs(name, length_penalty, tmp_path, one_device):
  theirs = reference(name)
  theirs.save_pretrained(tmp_path)
  model, params = load(tmp_path)
  prompt, count, beams = [2, *PROMPTS[0]], 8, 3
  given = (prompt, 0) if "encoder" in params else (prompt[1:], prompt[0])
  rows = on_mesh(model.prompts([given[0]], len(given[0]) + 3, given[1]))
  eos = int(our_text(model, params, [prompt], 4)[0][3])  # a token that it does write
  settings = {"beams": beams, "room": count, "eos_id": eos, "pad_id": 0, "length_penalty": length_penalty}
  found, scores = jax.jit(lambda p, x: beam.search(model, p, x, **settings))(params, rows)
  asked = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": count, "eos_token_id": eos}
  asked |= {"length_penalty": length_penalty, "do_sample": False, "early_stopping": False, "pad_token_id": 0}
  asked |= {"return_dict_in_generate": True, "output_scores": True}
  made = theirs.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **asked)
  written = made.sequences[:, 1 if "encoder" in params else len(prompt) :].numpy()
  ended = lambda row: row[: row.index(eos) + 1] if eos in row else row  # after EOS they write EOS, we write padding
  assert [ended(row) for row in np.asarray(found[0]).tolist()] == [
    ended(row) if eos in row else [*row, *[0] * (count - len(row))] for row in written.tolist()
  ]
  np.testing.assert_allclose(scores[0], made.sequences_scores.numpy(), atol=1e-4)
