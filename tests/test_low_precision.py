"""Products in 8 bits: close to the plain ones, the plain gradient, the same on any mesh; and tiny models learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from models import low_precision
from models.low_precision import quantised
from models.sharding import make_mesh, on_mesh, param_shardings
from tests.conftest import FORMS, distinct_params, packed_batch, small_model
from tests.test_optimizers import optimizer_of
from tests.test_step import MESHES
from train import programs
from train.step import make_step


@pytest.fixture
def qwix():
  return pytest.importorskip("qwix")


def run(form: str, mesh_name: str, kind: str, steps: int):
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform, losses = small_model(form), optimizer_of("adamw", learning_rate=3e-3), []
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(0)}
    step = make_step(model, transform, seed=0, tasks=2, join=lambda trained, frozen: quantised(trained, kind))
    step, batch = jax.jit(step, donate_argnums=0), on_mesh(packed_batch(FORMS[form][0]))
    for _ in range(steps):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
    return jax.device_get(state["params"]), {"loss": np.array(losses)}


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_product_is_close_and_its_gradient_is_the_plain_ones(qwix, kind, error):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 8, 32), (32, 4, 16)))
  equation, dims = "BTD,DKH->BTKH", (None,) * 4
  plain = jnp.einsum(equation, x, w)
  found, back = jax.vjp(lambda x, w: low_precision.product(equation, kind, dims, x, w), x, w)
  spread = float(jnp.std(found - plain) / jnp.std(plain))
  assert 1e-4 < spread < error
  for a, b in zip(back(plain), jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)[1](plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_tiny_model_learns_as_it_does_without(qwix):
  (_, plain), (_, found) = run("gpt", "1", "default", 12), run("gpt", "1", "int8", 12)
  assert found["loss"][-1] < found["loss"][0] - 0.3
  np.testing.assert_allclose(found["loss"], plain["loss"], atol=0.05)
  assert (found["loss"] != plain["loss"]).any()
  # On a mesh sums are rounded otherwise, and an entry at the edge of a code falls to the next.
  np.testing.assert_allclose(found["loss"], run("gpt", "all", "int8", 12)[1]["loss"], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_tiny_t5_learns_on_a_mesh(qwix, kind):
  (_, plain), (_, found) = run("t5", "all", "default", 12), run("t5", "all", kind, 12)
  assert found["loss"][-1] < found["loss"][0] - 0.3
  np.testing.assert_allclose(found["loss"], plain["loss"], atol=0.08)


def test_what_cannot_be_is_refused(monkeypatch):
  config = get_config()
  config.model.matmul = "int4"
  with pytest.raises(ValueError, match="known: .*'int8'"):
    programs.build_join(config)
  config.model.matmul = "int8"
  monkeypatch.setattr(low_precision.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="needs qwix, which is not installed"):
    programs.build_join(config)
  monkeypatch.setattr(low_precision.importlib.util, "find_spec", lambda name: name)
  config.lora.rank = 4
  with pytest.raises(ValueError, match="with adapters"):
    programs.build_join(config)
