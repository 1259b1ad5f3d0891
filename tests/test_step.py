"""The step: the same result on any mesh, by jit or shard_map, in one batch or several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from models.sharding import by_path, make_mesh, on_mesh, param_shardings
from tests.conftest import FORMS, VOCAB, distinct_params, packed_batch, small_model
from train import step as step_module
from train.checkpoint import with_layout
from train.loss import token_losses
from train.optimizer import build_optimizer, decay_mask
from train.step import all_trained, make_gradients, make_shard_map_step, make_step

MESHES = {
  "1": (1, 1, 1),
  "data": (8, 1, 1),
  "fsdp": (1, 8, 1),
  "tensor": (2, 1, 4),
  "data-fsdp": (2, 4, 1),
  "all": (2, 2, 2),
}


def optimizer_of(name: str):
  config = get_config().optimizer
  config.name, config.warmup_steps, config.learning_rate = name, 1, 1e-2
  return build_optimizer(config, 10)


def run(form: str, mesh_name: str, batch, *, optimizer="adafactor", kind="jit", steps=2, attention="auto", **settings):
  """Takes steps on a mesh; returns parameters and the last metrics, on the host."""
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform = small_model(form, attention=attention), optimizer_of(optimizer)
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(0)}
    settings = {"seed": 0, "tasks": 2, "z_loss": 1e-3, "chunk_tokens": 16, **settings}
    step = make_step(model, transform, **settings) if kind == "jit" else None
    step = jax.jit(step or make_shard_map_step(model, transform, mesh, **settings), donate_argnums=0)
    for _ in range(steps):
      state, metrics = step(state, on_mesh(batch))
    return jax.device_get((state["params"], metrics))


def assert_same(first, second, tolerance=2e-5):
  for name in first[1]:
    np.testing.assert_allclose(first[1][name], second[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
  paths = jax.tree_util.tree_leaves_with_path(first[0])
  for (path, a), b in zip(paths, jax.tree.leaves(second[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device_results():
  return {form: run(form, "1", packed_batch(FORMS[form][0])) for form in ("gpt", "t5", "gemma3")}


FIVE = [("gpt", name) for name in MESHES if name != "1"]


@pytest.mark.parametrize(
  ("form", "mesh_name"), [*FIVE, ("t5", "fsdp"), ("t5", "tensor"), ("t5", "all"), ("gemma3", "all")]
)
def test_one_device_equals_eight(form, mesh_name, one_device_results):
  assert_same(one_device_results[form], run(form, mesh_name, packed_batch(FORMS[form][0])))


@pytest.mark.parametrize("form", ["gpt", "t5"])
def test_jit_step_equals_shard_map_step(form, one_device_results):
  assert_same(one_device_results[form], run(form, "data", packed_batch(FORMS[form][0]), kind="shard_map"))


def test_shard_map_devices_draw_their_own_dropout():
  model, transform = small_model("gpt", dropout=0.5), optimizer_of("adamw")
  batch = {key: np.repeat(value[:1], 8, axis=0) for key, value in packed_batch(FORMS["gpt"][0]).items()}
  losses = []
  for devices in (2, 8):  # of equal masks the mean over equal rows would be one and the same
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
      params = distinct_params(model)
      params = jax.device_put(params, param_shardings(params, mesh))
      state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(0)}
      step = make_shard_map_step(model, transform, mesh, seed=0, tasks=2)
      _, metrics = jax.jit(step)(state, on_mesh({key: value[:devices] for key, value in batch.items()}))
      losses.append(float(metrics["loss"]))
  assert abs(losses[0] - losses[1]) > 1e-3


def test_shard_map_step_refuses_other_meshes():
  mesh = make_mesh({"fsdp": 8})
  with pytest.raises(ValueError, match="data-parallel only"):
    make_shard_map_step(small_model("gpt"), optimizer_of("adamw"), mesh, seed=0, tasks=1)


@pytest.mark.parametrize(
  ("form", "mesh_name", "normalisation"),
  [("gpt", "1", "token"), ("gpt", "data-fsdp", "task"), ("t5", "data-fsdp", "token")],
)
def test_accumulated_microbatches_equal_one_batch(form, mesh_name, normalisation):
  batch = packed_batch(FORMS[form][0], rows=16, loss_normalisation=normalisation)
  batch["decoder_loss_weights"][:9, 3:] = 0  # unequal numbers of supervised tokens, and rows with none
  batch["decoder_loss_weights"][1] = 0
  assert_same(run(form, "1", batch), run(form, mesh_name, batch, accumulation_steps=2))


def test_microbatches_of_bfloat16_are_summed_in_float32(one_device):
  batch = {key: np.repeat(value[:1], 64, axis=0) for key, value in packed_batch("gpt").items()}
  model, losses = small_model("gpt", storage="bfloat16"), {"z_loss": 0.0, "label_smoothing": 0.0, "chunk_tokens": 64}
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), distinct_params(model))
  make = partial(make_gradients, model, tasks=2, losses=losses, join=all_trained)
  first = {key: value[:1] for key, value in batch.items()}
  one, _ = make(accumulation_steps=1)(params, {}, on_mesh(first), None)
  sums, _ = jax.jit(make(accumulation_steps=64))(params, {}, on_mesh(batch), None)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(sums), strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(64 * np.asarray(a, np.float32), b, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("form", "mesh_name"), [("gpt2", "1"), ("gpt2", "all"), ("t5", "1")])
def test_gradients_of_bfloat16_products_are_summed_in_float32(form, mesh_name):
  """A sum of equal parts in bfloat16 stops at 256 of them: a frequent token or a bias would learn no more."""
  rows, model, architecture = 2048, small_model(form, dtype="bfloat16"), FORMS[form][0]
  losses = {"z_loss": 0.0, "label_smoothing": 0.0, "chunk_tokens": 4096}
  gradients = make_gradients(model, tasks=2, losses=losses, accumulation_steps=1, join=all_trained)
  shape, params = MESHES[mesh_name], distinct_params(model)
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    params = jax.device_put(params, param_shardings(params, mesh))

    def of(count: int):
      batch = {key: np.repeat(value[:1, :8], count, axis=0) for key, value in packed_batch(architecture).items()}
      return jax.device_get(jax.jit(gradients)(params, {}, on_mesh(batch), None)[0])

    few, many = of(8), of(rows)
  few, many = by_path(few), by_path(many)
  for path in few.keys() - {"layers/attention/key_bias"}:  # that one's is 0, and rounding
    expected = rows / 8 * np.asarray(few[path])
    np.testing.assert_allclose(many[path], expected, rtol=0.02, atol=0.01 * np.abs(expected).max(), err_msg=path)


def test_a_batch_without_supervised_tokens_changes_nothing():
  batch = packed_batch("gpt")
  batch["decoder_loss_weights"][:] = 0
  params, metrics = run("gpt", "1", batch, optimizer="adamw", steps=1)
  assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_on_a_cpu_moments_are_not_copied_before_they_are_written_over(one_device, monkeypatch):
  model, transform = small_model("gpt"), optimizer_of("adamw")
  params = distinct_params(model)
  state = {"params": params, "opt": transform.init(params), "step": jnp.int32(0)}

  def copies() -> int:
    step = make_step(model, transform, seed=0, tasks=2, z_loss=0.0, chunk_tokens=16)
    program = jax.jit(step, donate_argnums=0).lower(state, on_mesh(packed_batch("gpt"))).compile()
    return program.as_text().count(" copy(%state")

  assert copies() == 0
  monkeypatch.setattr(step_module, "once_made", lambda good, params: good)
  assert copies() > 0


def test_padding_rows_change_nothing(one_device_results):
  batch = packed_batch("t5")
  longer = {k: np.concatenate([v, np.full_like(v, -1 if k == "task_ids" else 0)]) for k, v in batch.items()}
  assert_same(one_device_results["t5"], run("t5", "1", longer))


def test_loss_is_a_mean_over_all_tokens_not_over_batches():
  # 3 tokens at loss 5 and 97 at 2: 2.09, not 3.5.
  weights = np.array([3.0, 97.0])
  assert float((weights * [5.0, 2.0]).sum() / weights.sum()) == pytest.approx(2.09)
  params, metrics = run("gpt", "1", packed_batch("gpt"), steps=1)
  by_task = (metrics["task_loss"] * metrics["task_weight"]).sum() / metrics["task_weight"].sum()
  assert float(metrics["loss"]) == pytest.approx(float(by_task), rel=1e-5)


@pytest.mark.parametrize("mesh_name", ["1", "all"])
@pytest.mark.parametrize(("vocab", "columns"), [(VOCAB, 128), (1000, 1000)])  # with padding, and summed in uneven steps
@pytest.mark.parametrize(
  ("chunk_tokens", "cap", "smoothing"), [(7, 0.0, 0.0), (1000, 0.0, 0.0), (7, 3.0, 0.0), (7, 0.0, 0.1), (7, 3.0, 0.3)]
)
def test_chunked_loss_equals_the_plain_one(mesh_name, vocab, columns, chunk_tokens, cap, smoothing):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(4, 6, 8)).astype(np.float32), rng.normal(size=(8, columns)).astype(np.float32)
  targets, weights = rng.integers(0, vocab, (4, 6)).astype(np.int32), rng.random((4, 6)).astype(np.float32)

  def plain(x, w):
    logits = (x @ w)[..., :vocab]
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = (1 - smoothing) * jax.nn.one_hot(targets, vocab) + smoothing / vocab
    nll = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(weights * (nll + 0.01 * log_z**2))

  def chunked(x, w, batch):
    settings = {"vocab_size": vocab, "z_loss": 0.01, "chunk_tokens": chunk_tokens, "logit_cap": cap}
    settings["label_smoothing"] = smoothing
    return token_losses(x, w, batch["targets"], batch["weights"], **settings)[0]

  expected = jax.value_and_grad(plain, (0, 1))(x, w)
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    batch = on_mesh({"x": x, "targets": targets, "weights": weights})
    got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(batch["x"], jnp.asarray(w), batch)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_label_smoothing_is_in_the_gradient_and_not_in_the_metrics():
  batch = packed_batch("gpt")
  (plain, loss), (smooth, same) = (run("gpt", "1", batch, optimizer="adamw", label_smoothing=e) for e in (0, 0.2))
  # Warm-up begins at rate 0: the second step's loss is that of the same parameters.
  assert loss["loss"] == same["loss"] and loss["task_loss"].tolist() == same["task_loss"].tolist()
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(smooth), strict=True))


def test_decay_touches_matrices_only():
  shapes = jax.eval_shape(small_model("t5").init, jax.random.key(0))
  mask = decay_mask(shapes)
  assert (
    mask["embed"]["tokens"] and mask["encoder"]["layers"]["mlp"]["up"] and mask["decoder"]["layers"]["cross"]["query"]
  )
  assert not mask["encoder"]["norm"]["scale"] and not mask["decoder"]["relative_bias"]["table"]
  biased = decay_mask(jax.eval_shape(small_model("gpt2").init, jax.random.key(0)))
  assert not biased["layers"]["attention"]["query_bias"] and not biased["layers"]["attention_norm"]["bias"]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_scaled_by_the_learning_rate(name):
  config = get_config().optimizer
  config.update({"name": name, "warmup_steps": 0, "learning_rate": 0.01, "weight_decay": 0.5, "schedule": "constant"})
  transform = build_optimizer(config, 10)
  params = {"layers": {"up": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 3))}}
  update, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
  np.testing.assert_allclose(update["layers"]["up"], -0.005, rtol=1e-5)
  np.testing.assert_allclose(update["head"]["kernel"], -0.005, rtol=1e-5)
  assert not np.asarray(update["layers"]["bias"]).any()


def test_adafactor_treats_stacked_layers_as_single_ones():
  transform, rng = optimizer_of("adafactor"), np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(3, 200, 130)), jnp.float32)
  grads = jnp.asarray(rng.normal(size=(3, 200, 130)) * np.array([1e-3, 1, 30])[:, None, None], jnp.float32) * 1e-3
  stacked, single = {"layers": {"up": weights}}, [{"layers": {"up": w[None]}} for w in weights]
  update, _ = transform.update({"layers": {"up": grads}}, transform.init(stacked), stacked)
  norm = jnp.sqrt(jnp.sum(jnp.square(grads)))  # clipping is global: single layers must see the same
  scale = jnp.minimum(1.0, 1.0 / norm)
  for layer in range(3):
    alone, _ = transform.update(
      {"layers": {"up": grads[layer][None] * scale}}, transform.init(single[layer]), single[layer]
    )
    np.testing.assert_allclose(update["layers"]["up"][layer], alone["layers"]["up"][0], rtol=1e-5)


def test_optimizer_state_inherits_its_parameter_layout():
  mesh, model, transform = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), small_model("gpt"), optimizer_of("adamw")
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    like = with_layout(jax.eval_shape(transform.init, params), mesh)
    made = jax.jit(transform.init)(params)
  specs = [leaf.sharding.spec for leaf in jax.tree.leaves(like) if leaf.ndim > 1]
  assert specs == [leaf.sharding.spec for leaf in jax.tree.leaves(made) if leaf.ndim > 1]
  assert any("fsdp" in spec and "tensor" in spec for spec in specs)


def test_unknown_names_list_the_known():
  config = get_config().optimizer
  config.name = "sgdw"
  with pytest.raises(ValueError, match="adafactor"):
    build_optimizer(config, 1)
  config.name, config.schedule = "adamw", "step"
  with pytest.raises(ValueError, match="rsqrt"):
    build_optimizer(config, 1)


def test_mesh_errors_say_what_is_there():
  with pytest.raises(ValueError, match="8 are present"):
    make_mesh({"data": 3})
  with pytest.raises(ValueError, match="at most one"):
    make_mesh({"data": -1, "fsdp": -1})
  model = small_model("gpt", kv_heads=1, heads=4)
  with pytest.raises(ValueError, match="attention/.*does not divide by mesh axis 'tensor'"):
    param_shardings(jax.eval_shape(model.init, jax.random.key(0)), make_mesh({"tensor": 8}))
