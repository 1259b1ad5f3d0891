"""Every attention path keeps the laws, and equals the plain one, gradients included, on one device and on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.features import CONVERTERS
from models import blockwise, splash
from models.attention import ATTENTION, FIXED_WINDOW, UNABLE, Call, RelativeBias, choose, path_of, xla_attention
from models.cudnn import cudnn_attention
from models.module import pure
from models.sharding import make_mesh, on_mesh
from models.visibility import Drop, Visibility
from tests.conftest import FORMS, distinct_params, examples, layout, packed_batch, small_model
from tests.test_step import MESHES, assert_same, run

# cuDNN itself needs a GPU: here its arguments are computed by XLA.
PATHS = {**ATTENTION, "cudnn": partial(cudnn_attention, implementation="xla")}
OTHERS = [name for name in PATHS if name != "xla"]
B, K, G, H = 8, 4, 2, 8  # rows and heads divide by every mesh of MESHES
# what is asked -> (queries, keys, fields of Visibility, cap, direction of a bias)
ASKED = {
  "causal": (28, 28, {}, 0.0, None),
  "window": (28, 28, {"window": 5}, 0.0, None),
  "window of several blocks": (270, 270, {"window": 140}, 0.0, None),
  "cap": (28, 28, {}, 2.0, None),
  "prefix": (28, 28, {"prefix": True}, 0.0, None),
  "prefix and window": (28, 28, {"prefix": True, "window": 5}, 0.0, None),
  "encoder": (30, 30, {"causal": False}, 0.0, None),
  "cross": (19, 30, {"causal": False}, 0.0, None),
  "causal bias": (28, 28, {}, 0.0, "left"),
  "bias in both directions": (70, 70, {"causal": False}, 0.0, "both"),
  "bias and cap": (28, 28, {}, 2.0, "left"),
}
LACKS = {
  "splash": {"prefix", "prefix and window", "causal bias", "bias in both directions", "bias and cap"},
  "cudnn": {"cap", "causal bias", "bias in both directions", "bias and cap"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks in short rows."""
  monkeypatch.setattr(blockwise, "BLOCK", 8)
  monkeypatch.setattr(splash, "QUERY_BLOCK", 128)
  monkeypatch.setattr(splash, "KEY_BLOCK", 128)


def segments_of(length: int, rng) -> jax.Array:
  """Rows of up to three segments, the last three tokens padding."""
  return jnp.asarray(np.sort(rng.integers(1, 4, (B, length)), axis=1) * (np.arange(length) < length - 3), jnp.int32)


def arguments(queries: int, keys: int, prefix=False, window=0, causal=True):
  """Random queries, keys and values, a Visibility, and a weight for each output."""
  rng = np.random.default_rng(queries)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v, w = normal(B, queries, K, G, H), normal(B, keys, K, H), normal(B, keys, K, H), normal(B, queries, K, G, H)
  query_segments = segments_of(queries, rng)
  key_segments = query_segments if queries == keys else segments_of(keys, rng)
  flags = jnp.broadcast_to(jnp.asarray(np.arange(queries) % 7 < 3, jnp.int32), (B, queries)) if prefix else None
  view = Visibility(query_segments, key_segments, causal, bidirectional_BT=flags, window=window)
  return (q, k, v), view, w * (query_segments > 0)[:, :, None, None, None]


def value_and_gradients(path, asked: str, block: int = 0):
  """Of a weighted sum of outputs, by queries, keys, values and the bias's table, whose blocks are of so many."""
  queries, keys, fields, cap, direction = ASKED[asked]
  qkv, view, w = arguments(queries, keys, **fields)
  bias = pure(lambda rngs: RelativeBias(rngs, K, direction == "both", 32, 20, 1.0, block)) if direction else None
  table = jax.tree.map(lambda x: jnp.tile(x, (1, 1, G)), bias.init(jax.random.key(0))) if direction else {}

  def total(q, k, v, table):
    added = bias.apply(table, queries, keys) if direction else None
    return jnp.sum(jnp.sin(path(q, k, v, view, added, 0.4, cap)) * w)

  return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*qkv, table)


def assert_agree(got, expected):
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def expected():
  return {asked: value_and_gradients(xla_attention, asked) for asked in ASKED}


@pytest.mark.parametrize(("name", "asked"), [(n, a) for n in OTHERS for a in ASKED if a not in LACKS.get(n, ())])
def test_equals_the_plain_path(name, asked, expected):
  got = value_and_gradients(PATHS[name], asked)
  assert_agree(got, expected[asked])


def test_splash_with_a_backward_kernel_for_each_side_equals_the_plain_path(expected, monkeypatch):
  monkeypatch.setattr(splash, "FUSED_KEYS", 0)  # as of long rows
  got = value_and_gradients(PATHS["splash"], "window of several blocks")
  assert_agree(got, expected["window of several blocks"])


BLOCKS = [("blockwise", "causal bias", 16), ("blockwise", "window", 24), ("splash", "window of several blocks", 256)]


@pytest.mark.parametrize(("name", "asked", "block"), BLOCKS)
def test_blocks_of_another_size_give_the_same(name, asked, block, expected, monkeypatch):
  seen = []
  inner = {"blockwise": (blockwise, "_pairs"), "splash": (splash, "_kernel")}[name]
  spied = getattr(*inner)
  monkeypatch.setattr(*inner, lambda *given: seen.append(given) or spied(*given))
  assert_agree(value_and_gradients(path_of(name, block), asked, block), expected[asked])
  assert seen and all((block, block) in (given[-2:], given[4]) for given in seen)


@pytest.mark.parametrize(("architecture", "path"), [("gpt", "blockwise"), ("t5", "blockwise"), ("gpt", "splash")])
def test_a_model_takes_the_blocks_of_its_config(architecture, path, one_device):
  plain = small_model(architecture)
  size = 128 if path == "splash" else 8
  blocks = small_model(architecture, attention="auto" if path == "blockwise" else path, attention_block=size)
  batch, params = packed_batch(architecture), distinct_params(plain)
  assert set(blocks.paths(batch).values()) == {path} != set(plain.paths(batch).values())
  got, expected = (np.asarray(jax.jit(model.features)(params, batch)) for model in (blocks, plain))
  real = batch["decoder_segment_ids"] > 0
  np.testing.assert_allclose(got[real], expected[real], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  ("name", "call", "where", "message"),
  [
    ("auto", {"block": 100}, "cpu", "attention_block must be 0 or a multiple of 8, got 100"),
    ("auto", {"block": -8}, "cpu", "attention_block must be 0 or a multiple of 8, got -8"),
    ("xla", {"block": 128}, "cpu", "'xla', which has no blocks, and config.model.attention_block is 128"),
    ("cudnn", {"block": 128}, "gpu", "'cudnn', which has no blocks"),
    ("splash", {"block": 200}, "tpu", "multiple of 128, not 200"),
    (
      "auto",
      {"block": 128, "dropout": True},
      "tpu",
      "is 128, and no path in blocks can: .* no dropout",
    ),
  ],
)
def test_blocks_that_no_path_has_are_refused(name, call, where, message):
  with pytest.raises(ValueError, match=message):
    choose(name, Call(512, 512, 64, "bfloat16")._replace(**call), where)
  assert choose("auto", Call(512, 512, 64, "bfloat16", block=256), "tpu") == "splash"
  assert choose("auto", Call(64, 64, 64, "bfloat16", block=8), "cpu") == "blockwise"


ON_MESHES = [(name, "window", mesh) for name in ("blockwise", "splash") for mesh in ("data", "tensor", "all")]
ON_MESHES += [
  ("blockwise", "causal bias", "data-fsdp"),
  ("blockwise", "causal bias", "all"),
  ("cudnn", "window", "all"),
]
# Rows are split over `data` and `fsdp` in one way.
ON_MESHES += [
  pytest.param(name, "window", mesh, marks=pytest.mark.slow)
  for name in ("blockwise", "splash")
  for mesh in MESHES
  if mesh not in ("1", "data", "tensor", "all")
]


@pytest.mark.parametrize(("name", "asked", "mesh_name"), ON_MESHES)
def test_equals_the_plain_path_on_meshes(name, asked, mesh_name, expected):
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), MESHES[mesh_name], strict=True)))
  with jax.set_mesh(mesh):
    got = jax.device_get(value_and_gradients(PATHS[name], asked))
  assert_agree(got, expected[asked])


@pytest.mark.parametrize("name", ["blockwise", "cudnn"])
def test_a_window_that_is_not_known_while_tracing(name, expected):
  moving = lambda q, k, v, view, bias, scale, cap: PATHS[name](
    q, k, v, view._replace(window=jnp.int32(view.window)), bias, scale, cap
  )
  got = value_and_gradients(moving, "window")
  assert_agree(got, expected["window"])


@pytest.mark.parametrize("name", PATHS)
def test_a_row_with_nothing_to_see_stays_finite(name):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.array(rng.normal(size=(1, 3, 2, *([1] if i == 0 else []), 4)), jnp.float32) for i in range(3))
  view = Visibility(jnp.array([[1, 1, 5]]), jnp.array([[1, 1, 1]]), causal=True)

  def total(q, k, v):
    y = PATHS[name](q, k, v, view, None, 0.5)
    return jnp.sum(jnp.square(y)), y

  gradients, y = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  for value in jax.tree.leaves((gradients, y)):
    assert jnp.isfinite(value).all()
  if name != "xla":
    assert not y[0, 2].any()  # no mean over what belongs to others


@pytest.mark.parametrize(
  ("name", "asked"), [(n, a) for n in PATHS for a in ("window", "causal bias") if a not in LACKS.get(n, ())]
)
def test_a_segment_does_not_reach_its_neighbour_bit_for_bit(name, asked):
  queries, keys, fields, cap, direction = ASKED[asked]
  (q, k, v), view, w = arguments(queries, keys, **fields)
  bias = pure(lambda rngs: RelativeBias(rngs, K, False, 32, 20, 1.0)) if direction else None
  table = jax.tree.map(lambda x: jnp.tile(x, (1, 1, G)), bias.init(jax.random.key(0))) if direction else {}
  first = (view.query_segments_BT == 1)[:, :, None, None]
  second = np.asarray(view.query_segments_BT == 2)

  def output(q, k, v):
    added = bias.apply(table, queries, keys) if direction else None
    return PATHS[name](q, k, v, view, added, 0.4, cap)

  def total(q, k, v):
    return jnp.sum(jnp.sin(output(q, k, v)) * w * (view.query_segments_BT == 2)[:, :, None, None, None])

  run_both = jax.jit(lambda q, k, v: (output(q, k, v), jax.grad(total, (0, 1, 2))(q, k, v)))
  before = run_both(q, k, v)
  after = run_both(jnp.where(first[..., None], 9.0, q), jnp.where(first, 9.0, k), jnp.where(first, -9.0, v))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert second.any() and (np.asarray(a)[second] == np.asarray(b)[second]).all()
  assert (np.asarray(before[0])[~second] != np.asarray(after[0])[~second]).any()
  for gradient in jax.tree.leaves(before[1]):  # and the second segment's loss does not move the first
    assert not np.asarray(gradient)[np.asarray(view.query_segments_BT) == 1].any()


@pytest.mark.parametrize("name", PATHS)
def test_causality_and_window_by_gradient(name):
  (q, k, v), view, _ = arguments(28, 28, window=5)
  view = view._replace(query_segments_BT=jnp.ones((B, 28), jnp.int32), key_segments_BS=jnp.ones((B, 28), jnp.int32))
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(PATHS[name](q, k, v, view, None, 0.4)[:, 12])))(v)
  assert np.flatnonzero(np.abs(gradient).sum(axis=(0, 2, 3))).tolist() == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("name", [name for name in PATHS if "prefix" not in LACKS.get(name, ())])
def test_a_prefix_is_seen_by_itself_only(name):
  (q, k, v), view, _ = arguments(28, 28)
  ones, flags = jnp.ones((B, 28), jnp.int32), jnp.asarray(np.arange(28) < 11, jnp.int32)
  view = view._replace(
    query_segments_BT=ones, key_segments_BS=ones, bidirectional_BT=jnp.broadcast_to(flags, ones.shape)
  )

  def reached(at: int) -> list[int]:
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(PATHS[name](q, k, v, view, None, 0.4)[:, at])))(v)
    return np.flatnonzero(np.abs(gradient).sum(axis=(0, 2, 3))).tolist()

  assert reached(2) == list(range(11)) and reached(14) == list(range(15))


MODELS_OF = [("gpt-grouped", "blockwise"), ("gpt-grouped", "splash"), ("gemma2", "splash"), ("t5", "blockwise")]


@pytest.mark.parametrize(("form", "name"), MODELS_OF)
def test_packed_equals_unpacked(form, name):
  model, architecture = small_model(form, attention=name), FORMS[form][0]
  params, pair = distinct_params(model), examples(3, longest=4)
  packed = CONVERTERS[architecture]([pair], layout(architecture))
  alone = CONVERTERS[architecture]([[example] for example in pair], layout(architecture))
  features = jax.jit(model.features)
  together, apart = np.asarray(features(params, packed)), np.asarray(features(params, alone))
  segments, begin = packed["decoder_segment_ids"][0], 0
  for i in range(3):
    length = int((segments == i + 1).sum())
    np.testing.assert_allclose(together[0, begin : begin + length], apart[i, :length], atol=2e-5)
    begin += length


@pytest.fixture(scope="module")
def plain_steps():
  return {form: run(form, "1", packed_batch(FORMS[form][0])) for form in ("gpt", "gemma2", "t5")}


STEPS = [("gpt", "splash", "fsdp", "jit"), ("gemma2", "splash", "all", "jit"), ("t5", "blockwise", "all", "jit")]
STEPS += [("gpt", "splash", "data", "shard_map"), ("t5", "blockwise", "data", "shard_map")]


@pytest.mark.parametrize(("form", "name", "mesh_name", "kind"), STEPS)
def test_steps_equal_those_of_the_plain_path_on_one_device(form, name, mesh_name, kind, plain_steps):
  batch = packed_batch(FORMS[form][0])
  assert_same(plain_steps[form], run(form, mesh_name, batch, kind=kind, attention=name))


def test_remat_changes_nothing():
  params, batch = distinct_params(small_model("gemma2")), packed_batch("gpt", rows=2)

  def gradients(model):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.features(p, batch)))))(params)

  plain = gradients(small_model("gemma2", attention="splash"))
  changed = gradients(small_model("gemma2", attention="splash", remat="full"))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(("form", "name"), [("gemma2", "splash"), ("t5", "blockwise")])
def test_prefill_takes_the_path_and_decoding_goes_on_from_it(form, name, one_device):
  params = distinct_params(small_model(form))

  def logits(model):
    prompts = on_mesh(model.prompts([[5, 6, 7, 1], [8, 1]], 6, 0))
    cache = jax.jit(lambda p, x: model.prefill(p, x, 2))(params, prompts)
    return jax.jit(model.extend)(params, cache, prompts["first"][:, None])[0][..., :100]

  np.testing.assert_allclose(logits(small_model(form)), logits(small_model(form, attention=name)), atol=5e-5)


def test_logits_of_a_long_row_are_never_whole():
  """Forward and backward of 2048 tokens: the plain path holds the logits, the other one a few blocks of them."""

  def bytes_of(path) -> int:
    shapes = [jax.ShapeDtypeStruct((1, 2048, *heads, 16), jnp.float32) for heads in ((2, 1), (2,), (2,))]
    segments = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def total(q, k, v, segments):
      return jnp.sum(path(q, k, v, Visibility(segments, segments, causal=True), None, 0.25))

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, "BLOCK", 256)
    whole = 2 * 2048 * 2048 * 4
    assert bytes_of(xla_attention) > whole and bytes_of(ATTENTION["blockwise"]) < whole / 4


def test_auto_chooses_by_platform_and_by_what_is_asked():
  plain, long = Call(256, 256, 64, "bfloat16"), Call(8192, 8192, 64, "bfloat16")
  assert [choose("auto", plain, where) for where in ("cpu", "gpu", "tpu")] == ["xla", "xla", "splash"]
  assert [choose("auto", long, where) for where in ("cpu", "gpu", "tpu")] == ["blockwise", "blockwise", "splash"]
  assert [choose("auto", Call(n, n, 64, "float32"), "cpu") for n in (511, 512)] == ["xla", "blockwise"]
  assert [choose("auto", call._replace(bias=True), "tpu") for call in (plain, long)] == ["xla", "blockwise"]
  assert choose("auto", plain._replace(prefix=True), "tpu") == "xla"
  assert choose("auto", long._replace(dropout=True), "tpu") == "xla"
  dropping = small_model("t5", attention="blockwise", dropout=0.1)
  assert set(dropping.paths(packed_batch("t5")).values()) == {"blockwise"}
  with pytest.raises(ValueError, match="no dropout"):
    dropping.paths(packed_batch("t5"), training=True)
  assert small_model("t5").paths(packed_batch("t5")) == {"encoder": "xla", "decoder": "xla", "cross": "xla"}
  assert small_model("gpt", attention="splash").paths(packed_batch("gpt")) == {"decoder": "splash"}


@pytest.mark.parametrize(
  ("name", "call", "where", "message"),
  [
    ("splash", {"bias": True}, "tpu", "no relative bias.*'auto', 'xla', 'blockwise'"),
    ("splash", {"prefix": True}, "tpu", "no bidirectional prefix"),
    ("splash", {}, "gpu", "runs on TPUs"),
    ("cudnn", {}, "cpu", "runs on GPUs"),
    ("cudnn", {"bias": True}, "gpu", "no relative bias"),
    ("cudnn", {"cap": True}, "gpu", "no soft cap"),
    ("cudnn", {"dtype": "float32"}, "gpu", "not float32"),
    ("cudnn", {"head_dim": 12}, "gpu", "and 12"),
    ("blockwise", {"dropout": True}, "cpu", "no dropout"),
    ("splash", {"dropout": True}, "tpu", "no dropout"),
    ("cudnn", {"dropout": True}, "gpu", "no dropout"),
    ("flash", {}, "tpu", "'flash'; known: .*'auto', 'blockwise', 'cudnn', 'splash', 'xla'"),
  ],
)
def test_a_path_that_cannot_do_it_is_refused(name, call, where, message):
  with pytest.raises(ValueError, match=message):
    choose(name, Call(512, 512, 64, "bfloat16")._replace(**call), where)


@pytest.mark.parametrize("name", OTHERS)
def test_a_path_that_is_called_for_what_it_lacks_raises(name):
  qkv, view, _ = arguments(8, 8)
  with pytest.raises(ValueError, match="no dropout"):
    PATHS[name](*qkv, view, None, 0.4, drop=Drop(0.1, jax.random.key(0)))
  lacking = {"splash": view._replace(bidirectional_BT=view.query_segments_BT), "blockwise": view._replace(offset=3)}
  with pytest.raises(ValueError, match="'splash' has no bid|'blockwise' has no cache|'cudnn' has no cap"):
    PATHS[name](*qkv, lacking.get(name, view), None, 0.4, 2.0)


def test_a_model_refuses_while_tracing():
  model = small_model("t5", attention="splash")
  with pytest.raises(ValueError, match="no relative bias"):
    jax.eval_shape(model.features, jax.eval_shape(model.init, jax.random.key(0)), packed_batch("t5"))
  model = small_model("gpt", attention="splash")
  batch = packed_batch("gpt", bidirectional_prefix=True)
  with pytest.raises(ValueError, match="no bidirectional prefix"):
    jax.eval_shape(model.features, jax.eval_shape(model.init, jax.random.key(0)), batch)
  assert choose("cudnn", Call(512, 512, 64, "bfloat16"), "gpu") == "cudnn"


def test_tables_agree():
  assert set(UNABLE) == set(ATTENTION) and set(ATTENTION) >= FIXED_WINDOW
