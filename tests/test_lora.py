"""Low-rank adapters: the same numbers by every way of applying them, on any mesh; nothing else is trained."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.base import get_config
from models import lora
from models.sharding import RULES, make_mesh, on_mesh, param_shardings, param_specs
from tests.conftest import FORMS, distinct_params, packed_batch, small_model
from tests.test_step import MESHES, assert_same, optimizer_of
from train.optimizer import decay_mask
from train.step import make_shard_map_step, make_step
from train.tuning import build_tuning

TARGETS = get_config().lora.targets
SCALE = 2.0
# Adapters know matrices, not families: these have all that there are, the other forms come with `-m slow`.
UNLIKE = ("gpt-grouped", "gpt2", "gemma3", "t5")
ALL = [*UNLIKE, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in UNLIKE)]


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def distinct_adapters(model, rank: int = 3, seed: int = 1):
  """Adapters of every matrix with every entry different, `b` too, so that they change the model."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes_of(model), rank=rank, targets=TARGETS))
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1, jnp.float32), shapes)


@pytest.mark.parametrize("form", ALL)
def test_every_matrix_of_the_layers_can_have_one(form):
  shapes = shapes_of(small_model(form))
  adapters = flatten_dict(lora.init(jax.random.key(0), shapes, rank=3, targets=TARGETS), sep="/")
  paths = [path for path in flatten_dict(shapes, sep="/") if "layers/" in path and "norm" not in path]
  matrices = {path for path in paths if not path.endswith("bias")}
  assert {path.rpartition("/")[0] for path in adapters} == matrices


@pytest.mark.parametrize("form", ALL)
def test_new_adapters_change_nothing(form):
  model = small_model(form)
  params, batch = distinct_params(model), packed_batch(FORMS[form][0])
  adapters = lora.init(jax.random.key(3), params, rank=3, targets=TARGETS)
  run = jax.jit(model.features)
  # Not always the same bits: XLA fuses the addition of zeros with a norm after it, and rounds that in another order.
  np.testing.assert_allclose(
    run(lora.combine(adapters, params, SCALE), batch), run(params, batch), rtol=1e-6, atol=1e-6
  )
  merged = lora.merge(adapters, params, SCALE)
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True))


def test_new_adapters_are_drawn_as_peft_draws_them():
  model = small_model("gpt", mlp_dim=4096)
  adapters = lora.init(jax.random.key(0), shapes_of(model), rank=64, targets=TARGETS)["layers"]
  for leaf, fan_in in ((adapters["mlp"]["down"]["lora_a"], 4096), (adapters["attention"]["out"]["lora_a"], 32)):
    # torch's kaiming_uniform_(a=sqrt(5)): bound = sqrt(2 / (1 + 5)) * sqrt(3 / fan_in)
    assert 0.95 < float(jnp.abs(leaf).max()) * fan_in**0.5 <= 1.0
    assert float(jnp.std(leaf)) * (3 * fan_in) ** 0.5 == pytest.approx(1, abs=0.05)
  first, second = adapters["mlp"]["down"]["lora_a"]
  assert (first != second).all()  # layers are not copies of each other
  assert not any(leaf.any() for path, leaf in flatten_dict(adapters, sep="/").items() if path.endswith("lora_b"))
  fewer = lora.init(jax.random.key(0), shapes_of(model), rank=64, targets="mlp/down$")["layers"]
  assert (fewer["mlp"]["down"]["lora_a"] == adapters["mlp"]["down"]["lora_a"]).all()


@pytest.mark.parametrize("form", ALL)
def test_applied_equals_merged(form):
  model = small_model(form)
  params, adapters, batch = distinct_params(model), distinct_adapters(model), packed_batch(FORMS[form][0])
  run = jax.jit(model.features)
  applied = run(lora.combine(adapters, params, SCALE), batch)
  np.testing.assert_allclose(applied, run(lora.merge(adapters, params, SCALE), batch), atol=2e-5)
  assert float(jnp.abs(applied - run(params, batch)).max()) > 0.1


@pytest.mark.parametrize("form", ALL)
def test_cached_decoding_with_adapters_equals_merged(form, one_device):
  model = small_model(form)
  params, adapters = distinct_params(model), distinct_adapters(model)
  prompts, tokens = model.prompts([[5, 6, 7, 1], [8, 1]], 6, 0), jnp.array([[4, 9], [11, 3]])

  def logits(params):
    return model.extend(params, model.prefill(params, prompts, 2), tokens)[0][..., : model.config.vocab_size]

  applied = jax.jit(logits)(lora.combine(adapters, params, SCALE))
  np.testing.assert_allclose(applied, jax.jit(logits)(lora.merge(adapters, params, SCALE)), atol=5e-5)


def test_adapters_compute_in_the_models_dtype():
  model = small_model("gpt-grouped", dtype="bfloat16")
  params = lora.combine(distinct_adapters(model), distinct_params(model), SCALE)
  assert jax.jit(model.features)(params, packed_batch("gpt")).dtype == jnp.bfloat16


def loss(model, params, batch):
  weights = batch["decoder_loss_weights"][..., None]
  return jnp.mean(jnp.square(model.features(params, batch)) * weights)


@pytest.mark.parametrize("form", UNLIKE)
def test_gradients_are_those_of_the_merged_weights(form):
  model = small_model(form)
  params, adapters, batch = distinct_params(model), distinct_adapters(model), packed_batch(FORMS[form][0])
  applied, merged = (
    jax.jit(jax.grad(lambda trained, join=join: loss(model, join(trained, params, SCALE), batch)))(adapters)
    for join in (lora.combine, lora.merge)
  )
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(applied), jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()), err_msg=str(path))
    assert jnp.abs(a).max() > 0


@cache
def gradients(form, **fields):
  params, adapters = distinct_params(small_model(form)), distinct_adapters(small_model(form))
  model, batch = small_model(form, **fields), packed_batch(FORMS[form][0], rows=2)
  return jax.jit(jax.grad(lambda trained: loss(model, lora.combine(trained, params, SCALE), batch)))(adapters)


@pytest.mark.parametrize("form", ["t5", pytest.param("gpt-grouped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", [{"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_unroll_and_remat_change_nothing(form, fields):
  for a, b in zip(jax.tree.leaves(gradients(form)), jax.tree.leaves(gradients(form, **fields)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(a).max()))


def products(jaxpr) -> set[int]:
  """Sizes of all matrix products of a program, loops and calls included; of what shape is the platform's choice."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found |= {variable.aval.size for variable in equation.outvars}
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
      found |= products(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else set()
  return found


def test_no_gradient_of_a_whole_weight_is_built():
  model = small_model("gpt", embed_dim=40, heads=6, kv_heads=3, head_dim=10, mlp_dim=72)
  params, adapters, batch = distinct_params(model), distinct_adapters(model), packed_batch("gpt")
  weights = {leaf[0].size for leaf in lora.targeted(params, TARGETS).values()}
  whole = jax.make_jaxpr(jax.grad(lambda p: loss(model, p, batch)))(params)
  low = jax.make_jaxpr(jax.grad(lambda a: loss(model, lora.combine(a, params, SCALE), batch)))(adapters)
  assert weights <= products(whole.jaxpr)
  assert not weights & products(low.jaxpr)


def run(form: str, mesh_name: str, batch, *, kind="jit", steps=2, **settings):
  """Takes steps on a mesh; returns the adapters, the last metrics and the frozen weights, on the host."""
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform = small_model(form), optimizer_of("adafactor")
  with jax.set_mesh(mesh):
    trained, frozen = (
      jax.device_put(tree, param_shardings(tree, mesh)) for tree in (distinct_adapters(model), distinct_params(model))
    )
    state = {"params": trained, "frozen": frozen, "opt": jax.jit(transform.init)(trained), "step": jnp.int32(0)}
    settings = {"seed": 0, "tasks": 2, "chunk_tokens": 16, "join": partial(lora.combine, scale=SCALE), **settings}
    make = make_step if kind == "jit" else partial(make_shard_map_step, mesh=mesh)
    step = jax.jit(make(model, transform, **settings), donate_argnums=0)
    for _ in range(steps):
      state, metrics = step(state, on_mesh(batch))
    return jax.device_get((state["params"], metrics, state["frozen"]))


@pytest.fixture(scope="module")
def one_device_results():
  return {form: run(form, "1", packed_batch(FORMS[form][0])) for form in ("gpt", "t5")}


FIVE = [("gpt", name) for name in MESHES if name != "1"]


@pytest.mark.parametrize(("form", "mesh_name"), [*FIVE, ("t5", "tensor"), ("t5", "all")])
def test_one_device_equals_eight(form, mesh_name, one_device_results):
  assert_same(one_device_results[form][:2], run(form, mesh_name, packed_batch(FORMS[form][0]))[:2])


@pytest.mark.parametrize("form", ["gpt", "t5"])
def test_jit_step_equals_shard_map_step(form, one_device_results):
  got = run(form, "data", packed_batch(FORMS[form][0]), kind="shard_map")
  assert_same(one_device_results[form][:2], got[:2])


@pytest.mark.parametrize(("form", "mesh_name"), [("gpt", "data-fsdp"), ("t5", "1")])
def test_accumulated_microbatches_equal_one_batch(form, mesh_name):
  batch = packed_batch(FORMS[form][0], rows=16)
  batch["decoder_loss_weights"][:9, 3:] = 0  # unequal numbers of supervised tokens
  assert_same(run(form, "1", batch)[:2], run(form, mesh_name, batch, accumulation_steps=2)[:2])


def test_steps_change_every_adapter_and_no_frozen_weight(one_device_results):
  for form, (trained, metrics, frozen) in one_device_results.items():
    before = jax.device_get((distinct_adapters(small_model(form)), distinct_params(small_model(form))))
    changes = jax.tree.leaves(jax.tree.map(lambda a, b: np.median(np.abs(a - b)), before[0], trained))
    assert min(changes) > 1e-4  # weight decay alone would be 1e-5
    assert metrics["gradient_norm"] > 0
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(frozen), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_and_decay_are_of_adapters_only(name):
  model, transform = small_model("t5"), optimizer_of(name)
  adapters = distinct_adapters(model)
  state = jax.tree.leaves(transform.init(adapters))
  count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
  layers = model.config.encoder_layers + model.config.decoder_layers
  if name == "adamw":
    assert 2 * count <= sum(leaf.size for leaf in state) <= 2 * count + 10 * layers
  else:
    assert sum(leaf.size for leaf in state) <= 2 * count + 10 * len(jax.tree.leaves(adapters)) * layers
  assert all(jax.tree.leaves(decay_mask(adapters)))
  grads = jax.tree.map(jnp.ones_like, adapters)
  update, _ = transform.update(grads, transform.init(adapters), adapters)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(update))


def test_frozen_weights_take_no_room_of_their_own_in_a_step():
  model, transform = small_model("gpt"), optimizer_of("adamw")
  trained, frozen = distinct_adapters(model), distinct_params(model)
  state = {"params": trained, "frozen": frozen, "opt": transform.init(trained), "step": jnp.int32(0)}
  step = jax.jit(make_step(model, transform, seed=0, tasks=2, join=partial(lora.combine, scale=1.0)), donate_argnums=0)
  analysis = step.lower(state, packed_batch("gpt")).compile().memory_analysis()
  assert analysis.alias_size_in_bytes >= 4 * sum(leaf.size for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize("form", ALL)
def test_adapters_lie_as_their_weights(form):
  shapes = shapes_of(small_model(form))
  weights, adapters = (
    flatten_dict(param_specs(tree), sep="/")
    for tree in (shapes, lora.init(jax.random.key(0), shapes, rank=3, targets=TARGETS))
  )
  assert any("lora_a" in pattern for pattern, _ in RULES)
  for path in {path.rpartition("/")[0] for path in adapters}:
    cut = 1 + lora.contracted_dims(path)  # after L and the contracted dims
    assert adapters[f"{path}/lora_a"] == jax.P(*weights[path][:cut], None)
    assert adapters[f"{path}/lora_b"] == jax.P(None, None, *weights[path][cut:])


def test_the_scale_follows_the_config():
  config = get_config()
  config.lora.rank, config.lora.alpha = 16, 32.0
  model = small_model("gpt")
  params, adapters = distinct_params(model), distinct_adapters(model, rank=16)
  query = lambda tree: tree["layers"]["attention"]["query"]
  product = jnp.einsum("LDR,LRKGH->LDKGH", query(adapters)["lora_a"], query(adapters)["lora_b"])
  for stabilised, scale in ((False, 2.0), (True, 8.0)):
    config.lora.rank_stabilised = stabilised
    merged = build_tuning(config).merge(adapters, params)
    np.testing.assert_allclose(query(merged) - query(params), scale * product, atol=1e-5)
    assert query(build_tuning(config).join(adapters, params)).scale == scale


@pytest.mark.parametrize(
  ("targets", "message"),
  [
    ("attention/qury$", "matches no parameter; what can: .*layers/attention/query"),
    ("attention/query", "matches layers/attention/query_bias, which cannot.*layers/mlp/down"),
    ("embed|mlp/up$", "matches embed/positions, embed/tokens, which cannot"),
    ("norm/scale", "matches .*norm/scale, which cannot"),
  ],
)
def test_wrong_targets_are_named(targets, message):
  with pytest.raises(ValueError, match=message):
    lora.init(jax.random.key(0), shapes_of(small_model("gpt2")), rank=2, targets=targets)


def test_wrong_uses_are_refused():
  with pytest.raises(TypeError, match="read as a whole"):
    lora.Adapted(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0)[0]
  config = get_config()
  config.lora.rank, config.lora.alpha = 4, 0.0
  with pytest.raises(ValueError, match="lora.alpha is 0.0; expected more than 0"):
    build_tuning(config)
