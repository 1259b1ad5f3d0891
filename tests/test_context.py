"""Rows split over `context`: the same result as on one device, on every attention path, and the laws of attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.features import CONVERTERS, Layout
from models import decode
from models.attention import ATTENTION, Call, RelativeBias, choose, xla_attention
from models.cudnn import cudnn_attention
from models.module import pure
from models.sharding import CONTEXT, make_mesh, on_mesh, param_shardings, pin
from tests.conftest import FORMS, distinct_params, examples, packed_batch, small_model
from tests.test_attention_paths import G, K, arguments, small_blocks  # noqa: F401 - for every test here, too
from train.evaluate import summer
from train.step import make_gradients, make_shard_map_step

MESHES = {
  "1": {},
  "context 2": {"data": 2, "context": 2, "tensor": 2},
  "context 4": {"fsdp": 2, "context": 4},
}
PATHS = {**ATTENTION, "cudnn": partial(cudnn_attention, implementation="xla")}


def mesh_of(name: str):
  sizes = MESHES[name]
  return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])


def batch_of(form: str):
  """Rows that divide over 4 devices, in blocks of 8 over 2."""
  return packed_batch("gpt") if FORMS[form][0] == "gpt" else wide_batch()


def wide_batch():
  pool = iter(examples(16, longest=5))
  form = Layout("t5", 32, 32, start_id=0, eos_id=1)
  return CONVERTERS["t5"]([[next(pool), next(pool)] for _ in range(8)], form)


def loss_and_gradients(form: str, mesh_name: str, attention="xla", key=None, steps=1, **fields):
  """Sums of a batch's metrics and gradients, on the host."""
  model = small_model(form, attention=attention, **fields)
  losses = {"z_loss": 1e-3, "label_smoothing": 0.1, "chunk_tokens": 16}
  run = make_gradients(model, tasks=2, losses=losses, accumulation_steps=steps, join=lambda trained, frozen: trained)
  mesh, params = mesh_of(mesh_name), distinct_params(model)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, param_shardings(params, mesh))
    return jax.device_get(jax.jit(run)(params, {}, on_mesh(batch_of(form)), key))


def assert_same(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(a).max()))


# Between them: rotary and learned positions, grouped queries, windows, soft caps, T5, dropout, microbatches, all axes.
QUICK = [("gemma2", "context 4", "xla", {"steps": 2}), ("t5", "context 2", "xla", {"dropout": 0.1})]
SLOW = [
  (form, mesh_name, attention, {})
  for form in ("gpt-grouped", "gpt2", "gemma2", "gemma3", "t5")
  for mesh_name in ("context 2", "context 4")
  for attention in ("xla", "blockwise")
]


@pytest.mark.parametrize(
  ("form", "mesh_name", "attention", "fields"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_one_device_equals_context(form, mesh_name, attention, fields):
  fields = {**fields, "key": jax.random.key(0) if "dropout" in fields else None}
  one = loss_and_gradients(form, "1", attention, **fields)
  assert_same(one, loss_and_gradients(form, mesh_name, attention, **fields))


# what is asked -> (path, parts of a row, tokens, fields of Visibility, cap, direction of a bias)
ASKED = {
  "causal and cap": ("blockwise", 2, 40, {}, 2.0, None),
  "moving window and prefix": ("blockwise", 4, 72, {"window": jnp.int32(20), "prefix": True}, 0.0, None),
  "window": ("blockwise", 4, 96, {"window": 20}, 0.0, None),
  "causal bias": ("blockwise", 2, 64, {}, 0.0, "left"),
  "bias in both directions": ("blockwise", 4, 64, {"causal": False}, 0.0, "both"),
  "splash": ("splash", 2, 256, {}, 0.0, None),
  "splash, window and cap": ("splash", 2, 512, {"window": 140}, 2.0, None),
  "cudnn": ("cudnn", 4, 32, {"window": 9}, 0.0, None),
}


def value_and_gradients(path, asked: str, parts: int):
  """Of a weighted sum of outputs, by queries, keys, values and the bias's table; rows split over `context`."""
  _, _, length, fields, cap, direction = ASKED[asked]
  (q, k, v), view, w = arguments(length, length, **fields)
  bias = pure(lambda rngs: RelativeBias(rngs, K, direction == "both", 32, 20, 1.0)) if direction else None
  table = jax.tree.map(lambda x: jnp.tile(x, (1, 1, G)), bias.init(jax.random.key(0))) if direction else {}

  def total(q, k, v, table):
    split = lambda x: pin(x, ("data", "fsdp"), CONTEXT) if parts > 1 else x
    segments = split(view.query_segments_BT)
    prefix = None if view.bidirectional_BT is None else split(view.bidirectional_BT)
    seen = view._replace(query_segments_BT=segments, key_segments_BS=segments, bidirectional_BT=prefix)
    added = bias.apply(table, length, length, parts=parts) if direction else None
    return jnp.sum(jnp.sin(path(split(q), split(k), split(v), seen, added, 0.4, cap)) * w)

  return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(q, k, v, table))


_SLOW = ("causal and cap", "splash, window and cap", "bias in both directions")


@pytest.mark.parametrize(
  "asked", [pytest.param(asked, marks=pytest.mark.slow) if asked in _SLOW else asked for asked in ASKED]
)
def test_every_path_equals_the_plain_one(asked):
  name, parts = ASKED[asked][:2]
  with jax.set_mesh(mesh_of(f"context {parts}")):
    got = value_and_gradients(PATHS[name], asked, parts)
  assert_same(value_and_gradients(xla_attention, asked, 1), got)


@pytest.fixture(scope="module")
def features():
  """`(tokens and segments of one GPT row of 24) -> its logits' features`, by blockwise over 4 parts; and the batch."""
  model, mesh = small_model("mistral", attention="blockwise"), mesh_of("context 4")
  params = distinct_params(model)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, param_shardings(params, mesh))
    run = jax.jit(model.features)

  def features(batch):
    with jax.set_mesh(mesh):
      return jax.device_get(run(params, on_mesh(batch)))

  return features


def test_no_example_of_a_packed_row_sees_another(features):
  batch = packed_batch("gpt", rows=2)
  first = batch["decoder_segment_ids"] == 1
  tokens = np.where(first, (batch["decoder_input_tokens"] + 7) % 90, batch["decoder_input_tokens"])
  before, after = features(batch), features({**batch, "decoder_input_tokens": tokens.astype(np.int32)})
  second = batch["decoder_segment_ids"] == 2
  assert second.any() and (before[second] == after[second]).all()
  assert (before[first] != after[first]).any(axis=-1).all()


@pytest.mark.parametrize("at", [5, 6, 13])  # the last token of a part, the first, one in the middle
def test_no_token_sees_later_ones(features, at):
  batch = packed_batch("gpt", rows=2)
  batch |= {"decoder_segment_ids": np.ones_like(batch["decoder_segment_ids"])}
  tokens = batch["decoder_input_tokens"].copy()
  tokens[:, at] = (tokens[:, at] + 1) % 90
  changed = (features(batch) != features({**batch, "decoder_input_tokens": tokens})).any(axis=-1)
  assert not changed[:, :at].any()
  # Two layers, each with a window of 3: this far, and no further, also beyond the end of a part.
  assert changed[:, at : at + 5].all() and not changed[:, at + 5 :].any()


@pytest.mark.parametrize("form", ["gpt", pytest.param("t5", marks=pytest.mark.slow)])
def test_decoding_and_held_out_loss(form):
  model, found = small_model(form), []
  prompts = model.prompts([[5, 6, 7, 1], [8, 1]] * 4, 6, 0)
  for name in ("1", "context 2"):
    mesh, params = mesh_of(name), distinct_params(model)
    with jax.set_mesh(mesh):
      params = jax.device_put(params, param_shardings(params, mesh))
      greedy = jax.jit(partial(decode.write, model, room=4, eos_id=10_000, pad_id=0))
      written = greedy(params, on_mesh(prompts, whole=True))
      found.append(jax.device_get((written, summer.__wrapped__(model, 16)(params, on_mesh(batch_of(form))))))
  assert (found[0][0] == found[1][0]).all()
  np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)


def test_what_does_not_divide_says_what_to_set():
  with jax.set_mesh(mesh_of("context 4")), pytest.raises(ValueError, match="rows of 22 tokens .* multiple of 4"):
    on_mesh({"tokens": np.zeros((2, 22), np.int32)})
  with pytest.raises(ValueError, match="data-parallel only"):
    make_shard_map_step(small_model("gpt"), None, make_mesh({"data": 4, "context": 2}), seed=0, tasks=1)


def test_auto_takes_a_path_that_can():
  call = Call(4096, 4096, 64, "float32", parts=4)
  assert choose("auto", call, "tpu") == "splash" and choose("auto", call, "cpu") == "blockwise"
  odd = Call(4100, 4100, 64, "float32", parts=4)
  assert choose("auto", odd, "tpu") == "blockwise"
  with pytest.raises(ValueError, match="multiple of 512 tokens with a context of 4; this call can take .*blockwise"):
    choose("splash", odd, "tpu")
  assert choose("auto", odd._replace(bias=True), "tpu") == "xla"
  with pytest.raises(ValueError, match="with a relative bias and a context of 4; this call can take .*xla"):
    choose("blockwise", odd._replace(bias=True), "cpu")
