"""Laws of every form of both architectures."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.features import CONVERTERS
from models import MODELS, decode
from models.sharding import RULES, on_mesh, param_specs
from tests.conftest import FORMS, VOCAB, distinct_params, examples, layout, packed_batch, small_model


def logits(model, params, batch) -> jax.Array:
  """Full-forward logits [B,T,V] of a batch."""
  plain = (model.features(params, batch) @ model.head(params))[..., :VOCAB]
  return model.logit_cap * jnp.tanh(plain / model.logit_cap) if model.logit_cap else plain


@pytest.mark.parametrize("form", FORMS)
def test_packed_equals_unpacked(form):
  model, architecture = small_model(form), FORMS[form][0]
  params, pair = distinct_params(model), examples(3, longest=4)
  packed = CONVERTERS[architecture]([pair], layout(architecture))
  alone = CONVERTERS[architecture]([[example] for example in pair], layout(architecture))
  run = jax.jit(partial(logits, model))
  together, apart = np.asarray(run(params, packed)), np.asarray(run(params, alone))
  segments, begin = packed["decoder_segment_ids"][0], 0
  for i in range(3):
    length = int((segments == i + 1).sum())
    np.testing.assert_allclose(together[0, begin : begin + length], apart[i, :length], atol=2e-5)
    begin += length


@pytest.mark.parametrize("form", FORMS)
def test_a_segment_does_not_reach_its_neighbour(form):
  model, architecture = small_model(form), FORMS[form][0]
  params, batch = distinct_params(model), packed_batch(architecture, rows=2)
  other = {key: value.copy() for key, value in batch.items()}
  for side in ("encoder", "decoder"):
    if f"{side}_segment_ids" in batch:
      other[f"{side}_input_tokens"][batch[f"{side}_segment_ids"] == 1] = 7
  second = batch["decoder_segment_ids"] == 2
  run = jax.jit(model.features)
  before, after = np.asarray(run(params, batch)), np.asarray(run(params, other))
  assert (before[second] == after[second]).all()
  assert (before[batch["decoder_segment_ids"] == 1] != after[batch["decoder_segment_ids"] == 1]).any()


@pytest.mark.parametrize("form", FORMS)
def test_causality_by_gradient(form):
  model, architecture = small_model(form), FORMS[form][0]
  params, batch = distinct_params(model), packed_batch(architecture, rows=1)
  length = int((batch["decoder_segment_ids"][0] == 1).sum())
  at = 1

  def output(table):
    changed = {**params, "embed": {**params["embed"], "tokens": table}}
    return jnp.sum(model.features(changed, fresh)[0, at])

  # Every position has a token of its own, so that a gradient row is a position.
  fresh = {
    **batch,
    "decoder_input_tokens": np.arange(3, 3 + batch["decoder_input_tokens"].shape[1])[None].astype(np.int32),
  }
  if architecture == "t5":
    fresh["encoder_input_tokens"] = np.full_like(batch["encoder_input_tokens"], 90)
  gradient = np.asarray(jax.jit(jax.grad(output))(params["embed"]["tokens"]))
  reached = np.abs(gradient[3 : 3 + length]).sum(axis=1) > 0
  assert reached[: at + 1].all() and not reached[at + 1 :].any()


def test_bidirectional_prefix_sees_ahead_and_targets_do_not():
  model = small_model("gpt")
  params, batch = distinct_params(model), packed_batch("gpt", rows=1, bidirectional_prefix=True)
  other = {key: value.copy() for key, value in batch.items()}
  prefix = int(np.argmin(batch["decoder_bidirectional"][0]))
  other["decoder_input_tokens"][0, prefix - 1] = 7
  before, after = (np.asarray(jax.jit(model.features)(params, b)) for b in (batch, other))
  assert (before[0, 0] != after[0, 0]).any()
  other = {key: value.copy() for key, value in batch.items()}
  other["decoder_input_tokens"][0, prefix] = 7
  assert (np.asarray(jax.jit(model.features)(params, other))[0, :prefix] == before[0, :prefix]).all()


def test_a_window_hides_what_is_further_back():
  model = small_model("gemma3", pattern="l")
  params, batch = distinct_params(model), packed_batch("gpt", rows=1)
  batch["decoder_segment_ids"][:] = 1
  batch["decoder_positions"][0] = np.arange(24)
  other = {**batch, "decoder_input_tokens": batch["decoder_input_tokens"].copy()}
  other["decoder_input_tokens"][0, 5] = 7
  before, after = (np.asarray(jax.jit(model.features)(params, b))[0] for b in (batch, other))
  changed = np.flatnonzero((before != after).any(axis=1))
  assert changed.tolist() == [5, 6, 7, 8, 9]  # two layers, each of which sees a token and the two before it


@pytest.mark.parametrize("fields", [{}, {"attention": "blockwise"}])
def test_a_window_that_no_layer_has_hides_nothing(fields):
  batch, forms = packed_batch("gpt", rows=1), [{"window": 0, "pattern": "g"}, {"window": 2, "pattern": "gl"}]
  batch["decoder_segment_ids"][:] = 1
  plain, windowed = (small_model("gpt", layers=1, **form, **fields) for form in forms)
  params = distinct_params(plain)
  found = [np.asarray(jax.jit(model.features)(params, batch)) for model in (plain, windowed)]
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("fields", [{"pattern": "x"}, {"pattern": "g"}, {"window": 0}, {"bias": True}, {"norm": "rms"}])
def test_choices_that_cannot_be_are_named(fields):
  with pytest.raises(ValueError, match="window|known: "):
    small_model("gemma2", **fields)


@pytest.mark.parametrize(
  ("form", "fields", "says"),
  [
    ("gpt", {"layers": 0}, "layers is 0; expected a whole number of 1 or more"),
    ("gpt", {"kv_heads": 0}, "kv_heads is 0"),
    ("gpt", {"mlp_dim": 2.5}, "mlp_dim is 2.5"),
    ("t5", {"heads": 0}, "heads is 0"),
    ("t5", {"dropout": 1.5}, "dropout is 1.5; expected a rate"),
    ("gpt", {"head_dim": 7}, "head_dim is 7; rotary"),
    ("gpt", {"rope_scaling": ("yarn", 2.0)}, "rope_scaling is"),
    ("gpt", {"positions": "learned"}, "max_length is 0"),  # and would have had no positions at all
    ("t5", {"max_distance": 16}, "max_distance 16"),  # log(1) divided by, and buckets below 0
    ("t5", {"buckets": 2}, "buckets is 2"),
  ],
)
def test_numbers_that_cannot_be_are_named(form, fields, says):
  with pytest.raises(ValueError, match=says):
    small_model(form, **fields)


@cache
def gradients(form, **fields):
  params, batch = distinct_params(small_model(form)), packed_batch(FORMS[form][0], rows=2)
  model = small_model(form, **fields)
  return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.features(p, batch)))))(params)


@pytest.mark.parametrize("form", ["gpt", "gemma3", "t5"])
@pytest.mark.parametrize(
  "fields", [{"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}, {"remat": "qkv+attention+out+gate+up"}]
)
def test_scan_unroll_and_remat_change_nothing(form, fields):
  for a, b in zip(jax.tree.leaves(gradients(form)), jax.tree.leaves(gradients(form, **fields)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(("fields", "kept_apart"), [({}, False), ({"scan_unroll": 2}, True), ({"layers": 1}, True)])
def test_without_a_loop_what_remat_computes_again_is_kept_apart(fields, kept_apart):
  """Else XLA finds it to be there already, and keeps it: on a v5e, four layers took the memory of no remat at all."""
  model = small_model("gpt", remat="full", **fields)
  params, batch = distinct_params(model), packed_batch("gpt", rows=2)
  lowered = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.features(p, batch))))).lower(params)
  assert ("optimization_barrier" in lowered.as_text()) == kept_apart


@pytest.mark.parametrize(("form", "prefix"), [*((form, False) for form in FORMS), ("gpt", True), ("gemma3", True)])
def test_cached_decoding_equals_the_full_forward(form, prefix, one_device):
  model, architecture = small_model(form), FORMS[form][0]
  params = distinct_params(model)
  pairs = examples(4, longest=7)
  form = layout(architecture, bidirectional_prefix=prefix)
  batch = CONVERTERS[architecture]([[pair] for pair in pairs], form)
  full = np.asarray(logits(model, params, batch))
  prompts = model.prompts([pair.inputs.tolist() for pair in pairs], 8, 0)
  prompts |= {"bidirectional": prompts["segments"]} if prefix else {}
  room = max(len(pair.targets) for pair in pairs)
  cache = jax.jit(lambda p, x: model.prefill(p, x, room))(params, on_mesh(prompts))
  extend, token = jax.jit(model.extend), on_mesh(prompts)["first"]
  for step in range(room):
    made, cache = extend(params, cache, token[:, None])
    for row, pair in enumerate(pairs):
      if step < len(pair.targets):
        at = step + (0 if architecture == "t5" else len(pair.inputs))
        np.testing.assert_allclose(made[row, 0, :VOCAB], full[row, at], atol=5e-5)
    token = on_mesh({"x": np.array([int(pair.targets[min(step, len(pair.targets) - 1)]) for pair in pairs], np.int32)})[
      "x"
    ]


@pytest.mark.parametrize("form", FORMS)
def test_label_scores_are_sums_of_the_full_forward(form, one_device):
  model, architecture = small_model(form), FORMS[form][0]
  params = distinct_params(model)
  prompts, labels = [[5, 6, 7, 1], [8, 1]], [[9, 1], [9, 10, 11, 1], [12, 1]]
  tokens, weights = np.zeros((3, 5), np.int32), np.zeros((3, 5), np.float32)
  for i, label in enumerate(labels):
    tokens[i, : len(label)], weights[i, : len(label)] = label, 1
  scores = jax.jit(lambda p, x: decode.score(model, p, x, tokens, weights))(
    params, on_mesh(model.prompts(prompts, 6, 0))
  )
  run = jax.jit(lambda p, b: jax.nn.log_softmax(logits(model, p, b)))
  for r, prompt in enumerate(prompts):
    for c, label in enumerate(labels):
      example = examples(1)[0]._replace(inputs=np.array(prompt), targets=np.array(label))
      batch = CONVERTERS[architecture]([[example]], layout(architecture))
      chosen = np.take_along_axis(np.asarray(run(params, batch))[0], batch["decoder_target_tokens"][0][:, None], 1)[
        :, 0
      ]
      assert float((chosen * batch["decoder_loss_weights"][0]).sum()) == pytest.approx(float(scores[r, c]), abs=1e-4)


@pytest.mark.parametrize("form", ["gpt2", "t5"])
def test_greedy_stops_at_eos_and_never_answers_with_padding(form, one_device):
  model = small_model(form)
  params = distinct_params(model)
  prompts = model.prompts([[5, 6, 1], [7, 1]], 4, 0)
  free = np.asarray(
    jax.jit(lambda p, x: decode.write(model, p, x, room=6, eos_id=10_000, pad_id=0))(params, on_mesh(prompts))
  )
  assert free.shape == (2, 6) and (free < VOCAB).all()
  stop = int(free[0, 2])
  ended = np.asarray(
    jax.jit(lambda p, x: decode.write(model, p, x, room=6, eos_id=stop, pad_id=0))(params, on_mesh(prompts))
  )
  first = int(np.argmax(free[0] == stop))
  assert ended[0, : first + 1].tolist() == free[0, : first + 1].tolist() and not ended[0, first + 1 :].any()


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_layout(form):
  model = small_model(form)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert len(jax.tree.leaves(param_specs(shapes))) == len(jax.tree.leaves(shapes))


def test_a_parameter_without_a_rule_is_an_error():
  assert RULES[-1][0] != ""
  with pytest.raises(ValueError, match="new/thing"):
    param_specs({"new": {"thing": np.zeros((2, 2))}})


@pytest.mark.parametrize("architecture", MODELS)
def test_unknown_size_or_field_is_named(architecture):
  with pytest.raises(ValueError, match="'huge'.*tiny"):
    MODELS[architecture]("huge", 100)
  with pytest.raises(ValueError, match="'colour'"):
    MODELS[architecture]("tiny", 100, colour=1)


def test_published_sizes_have_their_published_parameters():
  # GPT-2 124M, T5 v1.1 base 248M, Llama 2 7B: without the vocabulary's padding, as published.
  def count(architecture, size, vocab):
    model = MODELS[architecture](size, vocab)
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    embeddings = (1 if model.config.tied else 2) * (model.config.padded_vocab_size - vocab) * model.config.embed_dim
    return sum(leaf.size for leaf in leaves) - embeddings

  assert count("gpt", "gpt2", 50257) == 124_439_808
  assert count("gpt", "llama2-7b", 32000) == 6_738_415_616
  assert count("gpt", "smollm2-135m", 49152) == 134_515_008
  assert count("t5", "t5-v1.1-base", 32128) == 247_577_856
  assert count("gpt", "llama3.2-1b", 128_256) == 1_235_814_400
  assert count("gpt", "mistral-7b", 32000) == 7_241_732_096
  assert count("gpt", "qwen2.5-0.5b", 151_936) == 494_032_768
  assert count("gpt", "qwen3-0.6b", 151_936) == 596_049_920
  assert count("gpt", "gemma2-2b", 256_000) == 2_614_341_888
  assert count("gpt", "gemma3-1b", 262_144) == 999_885_952
  assert count("t5", "t5-base", 32128) == 222_903_552
  assert count("t5", "byt5-small", 384) == 299_637_760
