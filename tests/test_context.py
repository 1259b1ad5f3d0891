"""Rows split over `context`: the same result as on one device, on every attention path, and the laws of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from data.features import CONVERTERS
from models import blockwise, decode, splash
from models.attention import Call, choose
from models.sharding import make_mesh, param_shardings
from tests.conftest import FORMS, distinct_params, examples, layout, packed_batch, small_model
from train.evaluate import on_mesh, summer
from train.step import make_gradients, make_shard_map_step

MESHES = {
  "1": {},
  "context 2": {"data": 2, "context": 2, "tensor": 2},
  "context 4": {"fsdp": 2, "context": 4},
}


def mesh_of(name: str):
  sizes = MESHES[name]
  return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])


def loss_and_gradients(form: str, mesh_name: str, batch, attention: str = "xla", key=None, steps=1, **fields):
  model, mesh = small_model(form, attention=attention, **fields), mesh_of(mesh_name)
  losses = {"z_loss": 1e-3, "label_smoothing": 0.1, "chunk_tokens": 16}
  run = make_gradients(model, tasks=2, losses=losses, accumulation_steps=steps, join=lambda trained, frozen: trained)
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    return jax.device_get(jax.jit(run)(params, {}, on_mesh(batch), key))


def assert_same(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("mesh_name", ["context 2", "context 4"])
@pytest.mark.parametrize("form", ["gpt-grouped", "gpt2", "gemma2", "t5"])
def test_one_device_equals_context(form, mesh_name):
  batch = packed_batch(FORMS[form][0])
  assert_same(loss_and_gradients(form, "1", batch), loss_and_gradients(form, mesh_name, batch))
