"""Each optimizer against its definition; the same on any mesh; moments in few bits; state in the host's memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.base import get_config
from models.sharding import by_path, make_mesh, on_mesh, param_shardings
from tests.conftest import distinct_params, packed_batch, small_model
from tests.test_step import MESHES, assert_same
from train import moments
from train.optimizer import OPTIMIZERS, build_optimizer, gradient_point, matrix_dims
from train.step import make_step


def config_of(name: str, **different):
  config = get_config().optimizer
  config.update({"name": name, "warmup_steps": 0, "schedule": "constant", "learning_rate": 1e-2, "clip_norm": 0.0})
  config.update(different)
  return config


def optimizer_of(name: str, **different):
  return build_optimizer(config_of(name, **different), 100)


def weights_of(seed: int = 0):
  """Two layers with a query DKGH and a norm; an embedding and a head."""
  rng = np.random.default_rng(seed)
  shapes = {"layers": {"attention": {"query": (2, 8, 2, 1, 3)}, "attention_norm": {"scale": (2, 8)}}}
  shapes |= {"embed": {"tokens": (12, 8)}, "head": {"kernel": (8, 12)}}
  scale = {2: 1.0, 5: np.array([1.0, 30.0]).reshape(2, 1, 1, 1, 1)}  # layers of unlike size
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s) * scale[len(s)], jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
  )


def distance(target, params):
  return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))


def first_update(transform, params, grads):
  return transform.update(grads, transform.init(params), params)[0]


def run(form: str, mesh_name: str, settings, steps: int = 2, batch=None):
  """Takes steps on a mesh; returns the state, on the mesh, and the losses."""
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform, losses = small_model(form), build_optimizer(settings, 100), []
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(0)}
    step = make_step(model, transform, seed=0, tasks=2, chunk_tokens=64, point=gradient_point(settings))
    step, batch = jax.jit(step, donate_argnums=0), on_mesh(packed_batch("gpt") if batch is None else batch)
    for _ in range(steps):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  return state, losses


def on_host(state, losses):
  return jax.device_get(state["params"]), {"loss": losses}


KINDS = {
  "muon": {},
  "schedule_free": {},
  "adamw_rms": {},
  "adamw": {"moments_dtype": "int8"},
  "lion": {"moments_dtype": "bfloat16", "learning_rate": 1e-3},
}


@pytest.mark.parametrize(
  "name", [name if name in ("muon", "adamw") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_one_device_equals_eight(name):
  # No warm-up and a rate of 1e-2: Adam's first update of an entry whose gradient is rounding noise is noise, too.
  settings = config_of(name, **{"eps": 1e-4, **KINDS[name]})
  one, all_axes = (run("gpt", mesh, settings) for mesh in ("1", "all"))
  assert_same(on_host(*one), on_host(*all_axes), 2e-4 if "moments_dtype" in KINDS[name] else 2e-5)
  # Every moment is split as its parameter is.
  split = [leaf for leaf in jax.tree.leaves(all_axes[0]["opt"]) if leaf.ndim > 2]
  assert split and all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in split)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_of_them_learn(name):
  rate = {"adafactor": 3e-2, "adamw_rms": 3e-2}.get(name, 0.5)
  settings, params, target = config_of(name, learning_rate=rate), weights_of(), weights_of(1)
  transform, point = build_optimizer(settings, 100), gradient_point(settings)
  loss = partial(distance, target)

  @jax.jit
  def step(params, state):
    updates, state = transform.update(jax.grad(loss)(point(params, state)), state, params)
    return optax.apply_updates(params, updates), state

  state, before = transform.init(params), loss(params)
  for _ in range(30):
    params, state = step(params, state)
  assert loss(params) < 0.9 * before


def test_muon_orthogonalises_each_layers_matrix_and_nothing_else():
  params, grads = weights_of(), weights_of(1)
  update = first_update(optimizer_of("muon", weight_decay=0.0), params, grads)
  alone = optax.contrib.muon(1e-2, beta=0.9, consistent_rms=0.2, adam_b2=0.98)
  for layer in range(2):
    matrix = grads["layers"]["attention"]["query"][layer].reshape(8, 6)
    expected = first_update(alone, {"w": matrix}, {"w": matrix})["w"]
    np.testing.assert_allclose(update["layers"]["attention"]["query"][layer].reshape(8, 6), expected, rtol=1e-4)
    values = np.linalg.svd(np.asarray(expected), compute_uv=False) / (1e-2 * 0.2 * 8**0.5)
    assert (values > 0.6).all() and (values < 1.3).all()  # near 1, as far as five steps of Newton and Schulz go
  adam = optax.adamw(1e-2, 0.9, 0.98, weight_decay=0.0, nesterov=True)
  for path in ("embed/tokens", "head/kernel", "layers/attention_norm/scale"):
    expected = by_path(first_update(adam, params, grads))[path]
    np.testing.assert_allclose(by_path(update)[path], expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["gpt2", "t5", "gemma2"])
def test_muon_takes_the_matrices_of_layers(form):
  shapes = jax.eval_shape(small_model(form).init, jax.random.key(0))
  is_dims = lambda leaf: leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)
  dims, leaves = jax.tree.leaves(matrix_dims(shapes), is_leaf=is_dims), by_path(shapes)
  specs = {path: (leaf.ndim, dim) for (path, leaf), dim in zip(leaves.items(), dims, strict=True)}
  for path, (ndim, dim) in specs.items():
    matrix = "layers/" in path and ndim > 2 and not path.endswith("_bias")
    assert (dim is not None) == matrix, path
    if dim is not None:  # L is the only dim that is neither
      assert sorted((*dim.reduction_axis, *dim.output_axis)) == list(range(1, ndim))
  out = next(dim for path, (_, dim) in specs.items() if path.endswith("attention/out"))
  assert out.reduction_axis == (1, 2, 3) and out.output_axis == (4,)


def test_muon_without_a_matrix_is_refused():
  with pytest.raises(ValueError, match="no matrix of a layer is trained"):
    optimizer_of("muon").init({"embed": {"tokens": jnp.ones((4, 4))}})


def test_adamw_rms_scales_each_layers_update_by_its_weights():
  params, grads = weights_of(), weights_of(1)
  plain = first_update(optimizer_of("adamw", weight_decay=0.0), params, grads)
  scaled = first_update(optimizer_of("adamw_rms", weight_decay=0.0), params, grads)
  for layer in range(2):
    pick = lambda tree, layer=layer: np.asarray(tree["layers"]["attention"]["query"][layer])
    rms = np.sqrt(np.mean(pick(params) ** 2))
    np.testing.assert_allclose(pick(scaled), pick(plain) * rms, rtol=1e-5)
  decayed = first_update(optimizer_of("adamw_rms", weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, grads))
  np.testing.assert_allclose(decayed["embed"]["tokens"], -0.005 * params["embed"]["tokens"], rtol=1e-5)
  assert not np.asarray(decayed["layers"]["attention_norm"]["scale"]).any()


@pytest.mark.parametrize("name", ["lion", "muon", "schedule_free"])
def test_weight_decay_takes_the_rates_share_of_matrices_only(name):
  params = weights_of()
  update = first_update(optimizer_of(name, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
  for path, leaf in by_path(update).items():
    expected = 0.0 if path.endswith("scale") else -0.005 * np.asarray(by_path(params)[path])
    np.testing.assert_allclose(leaf, expected, atol=1e-6, rtol=1e-4, err_msg=path)


def test_schedule_free_holds_what_optax_evaluates():
  settings = config_of("schedule_free", warmup_steps=3, weight_decay=0.0, b1=0.9)
  ours, point = build_optimizer(settings, 100), gradient_point(settings)
  rate = optax.join_schedules([optax.linear_schedule(0, 1e-2, 3), optax.constant_schedule(1e-2)], [3])
  theirs = optax.contrib.schedule_free_adamw(rate, b1=0.9, b2=0.98)
  target = weights_of(1)
  slope = jax.grad(partial(distance, target))
  average, iterate = weights_of(), weights_of()
  ours_state, theirs_state = ours.init(average), theirs.init(iterate)
  for _ in range(20):
    updates, ours_state = ours.update(slope(point(average, ours_state)), ours_state, average)
    average = optax.apply_updates(average, updates)
    updates, theirs_state = theirs.update(slope(iterate), theirs_state, iterate)
    iterate = optax.apply_updates(iterate, updates)
  expected = optax.contrib.schedule_free_eval_params(theirs_state, iterate)
  for a, b, c in zip(*map(jax.tree.leaves, (average, expected, iterate)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
    assert np.abs(np.asarray(b - c)).max() > 1e-4  # and the point of the gradient is another


@pytest.mark.parametrize("different", [{"schedule": "cosine"}, {"b1": 0.0}])
def test_schedule_free_refuses_a_decay(different):
  with pytest.raises(ValueError, match="takes the schedule 'constant'"):
    optimizer_of("schedule_free", **different)


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["mu", "nu"])
def test_rounding_is_unbiased(kind, form):
  rng = np.random.default_rng(0)
  x = np.exp(rng.normal(size=(2, 256)) * 2) * (1 if kind == "nu" else rng.choice([-1, 1], (2, 256)))
  x = jnp.asarray(x, jnp.float32)
  pack, unpack = moments.FORMS[form]
  draws = jax.vmap(lambda key: unpack(pack(kind, x, key)))(jax.random.split(jax.random.key(0), 4000))
  mean, spread = np.asarray(draws.mean(axis=0)), np.asarray(draws.std(axis=0))
  floor = np.abs(x).max() / 255.0**4 * 1.01 if kind == "nu" else 0.0  # the least code of `nu` is not 0
  assert (np.abs(mean - x) <= 5 * spread / 4000**0.5 + 1e-5 * np.abs(x) + floor).all()
  assert (np.asarray(draws)[:, np.asarray(x) != 0] != 0).all() or kind == "mu"


def test_blocks_have_scales_of_their_own():
  x = jnp.concatenate([jnp.full((1, 128), 1e-6), jnp.full((1, 128), 1e3)], axis=1)
  packed = moments.to_int8("nu", x, jax.random.key(0))
  assert (
    packed["nu_codes"].dtype == jnp.uint8 and packed["nu_codes"].shape == x.shape and packed["scales"].shape == (1, 2)
  )
  np.testing.assert_allclose(moments.from_int8(packed), x, rtol=1e-6)
  assert not np.asarray(moments.from_int8(moments.to_int8("mu", jnp.zeros((4, 96)), jax.random.key(0)))).any()


@pytest.mark.parametrize(
  "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "muon", "schedule_free"))]
)
def test_moments_in_few_bits_track_those_in_float32(name):
  curves, sizes, rate = {}, {}, 3e-3
  for form in ("float32", "bfloat16", "int8"):
    state, curves[form] = run("gpt", "1", config_of(name, moments_dtype=form, learning_rate=rate), steps=25)
    sizes[form] = sum(
      leaf.nbytes for path, leaf in by_path(state["opt"]).items() if {"mu", "nu"} & set(path.split("/")) and leaf.ndim
    )
  assert curves["float32"][-1] < curves["float32"][0] - 0.5
  for form, most in (("bfloat16", 0.75), ("int8", 0.6)):
    np.testing.assert_allclose(curves[form], curves["float32"], atol=0.05)
    assert sizes[form] < most * sizes["float32"]


@pytest.mark.parametrize("name", ["adamw", "adamw_rms", "adafactor"])
@pytest.mark.parametrize("kept", ["layers", "embed"])
def test_layers_alone_and_everything_else_alone_can_be_trained(name, kept):
  whole, part, grads = weights_of(), {kept: weights_of()[kept]}, weights_of(1)
  expected = first_update(optimizer_of(name), whole, grads)[kept]
  got = first_update(optimizer_of(name), part, {kept: grads[kept]})[kept]
  for a, b in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacks_of_unlike_depth_are_each_updated_as_alone(name):
  """ByT5's encoder is three times as deep as its decoder."""
  weights = lambda seed: {"encoder": weights_of(seed), "decoder": jax.tree.map(lambda x: x[:1], weights_of(seed + 2))}
  params, grads, transform = weights(0), weights(1), optimizer_of(name)
  together = jax.jit(transform.update)(grads, transform.init(params), params)[0]
  for stack in params:
    alone = first_update(transform, {stack: params[stack]}, {stack: grads[stack]})[stack]
    for a, b in zip(*map(jax.tree.leaves, (together[stack], alone)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)  # schedule-free's is a difference of weights of up to 100
  kept = jax.eval_shape(transform.init, {stack: params["encoder"] for stack in params})
  assert not [path for path in by_path(kept) if "stacked_" in path]  # of one depth they are as they always were


def test_an_optimizer_without_moments_refuses_a_dtype_for_them():
  with pytest.raises(ValueError, match="no moments to keep"):
    optimizer_of("adafactor", moments_dtype="int8").init(weights_of())
  with pytest.raises(ValueError, match="known: .*'int8'"):
    optimizer_of("adamw", moments_dtype="float16")


def test_a_stage_of_no_steps_needs_no_schedule():
  config = get_config().optimizer
  config.schedule, config.decay_steps = "wsd", 5
  params = {"w": jnp.ones((4, 4))}
  assert jax.tree.structure(build_optimizer(config, 0).init(params)) == jax.tree.structure(
    build_optimizer(config, 500).init(params)
  )


def test_adafactor_factors_a_query_whose_heads_are_small():
  """T5's query of 12 heads of 64 is a matrix of 768 by 768: rows and columns are kept, not every entry."""
  params = {"layers": {"attention": {"query": jnp.ones((2, 256, 4, 1, 64)), "out": jnp.ones((2, 4, 1, 64, 256))}}}
  transform = optimizer_of("adafactor")
  state = transform.init(params)
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * 2 * 2 * 256 + 100
  flat = {"layers": {"up": jnp.ones((2, 256, 256))}}
  rng = np.random.default_rng(0)
  grads = jnp.asarray(rng.normal(size=(2, 256, 256)), jnp.float32)
  updates = first_update(
    transform,
    {"layers": {"attention": {"query": params["layers"]["attention"]["query"]}}},
    {"layers": {"attention": {"query": grads.reshape(2, 256, 4, 1, 64)}}},
  )
  expected = first_update(transform, flat, {"layers": {"up": grads}})
  np.testing.assert_allclose(
    updates["layers"]["attention"]["query"].reshape(2, 256, 256), expected["layers"]["up"], rtol=1e-6
  )


@pytest.mark.parametrize("key", ["clip_norm", "weight_decay", "warmup_steps"])
def test_numbers_below_nothing_are_refused(key):
  config = get_config().optimizer
  config[key] = -1
  with pytest.raises(ValueError, match=f"config.optimizer.{key} is -1"):
    build_optimizer(config, 10)


@pytest.mark.parametrize(
  ("key", "value"),
  [("b1", 1.0), ("b2", 1.0), ("b2", 98.0), ("eps", 0.0), ("initial_fraction", -0.1), ("final_fraction", -0.1)],
)
def test_numbers_that_give_nan_or_climb_the_loss_are_refused(key, value):
  """All weights were NaN after a step, or the rate went below 0, without a word."""
  with pytest.raises(ValueError, match=f"config.optimizer.{key} is {value}; expected"):
    optimizer_of("adamw", **{key: value})
