"""What a run tells of its tasks: the tasks' gradients add up to the step's, on any mesh and in microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sharding import make_mesh, param_shardings
from tests.conftest import distinct_params, packed_batch, small_model
from tests.test_step import MESHES, optimizer_of
from tests.test_train import config_of, domain, one_cpu, run  # noqa: F401  fixtures
from train import loop
from train.evaluate import on_mesh
from train.log import read_metrics
from train.programs import task_gradients_every
from train.step import make_step, make_task_gradients

SETTINGS = {"seed": 0, "tasks": 3, "z_loss": 1e-3, "label_smoothing": 0.1, "chunk_tokens": 16}  # of them 2 are there


@functools.cache
def programs(form: str, mesh_name: str, dropout: float, accumulation_steps: int):
  """Returns a mesh, a state on it, and what is compared, compiled once."""
  shape, settings = MESHES[mesh_name], {**SETTINGS, "accumulation_steps": accumulation_steps}
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform = small_model(form, dropout=dropout), optimizer_of("adamw")
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(3)}
  return mesh, state, jax.jit(make_task_gradients(model, **settings)), jax.jit(make_step(model, transform, **settings))


def both(form: str, mesh_name: str = "1", batch=None, dropout: float = 0.0, accumulation_steps: int = 1):
  """Returns the tasks' gradients and the metrics of the step at the same state."""
  mesh, state, task_gradients, step = programs(form, mesh_name, dropout, accumulation_steps)
  batch = packed_batch(form, rows=16, loss_normalisation="example") if batch is None else batch
  with jax.set_mesh(mesh):
    return jax.device_get((task_gradients(state, on_mesh(batch)), step(state, on_mesh(batch))[1]))


@pytest.fixture(scope="module")
def plain():
  return both("gpt")


def test_they_add_up_to_the_steps_gradient(plain):
  found, metrics = plain
  norms, cosines = found["task_gradient_norm"], found["task_gradient_cosine"]
  # The projections of the parts on the whole add up to the whole; so for any weights, z-loss and smoothing.
  assert (norms * cosines).sum() == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
  np.testing.assert_allclose(found["task_gradient_share"], norms / norms.sum(), rtol=1e-6)
  assert norms[2] == cosines[2] == 0 and (norms[:2] > 0).all() and (abs(cosines) <= 1).all()
  assert len(set(norms[:2].tolist())) == 2


def test_a_tasks_gradient_is_that_of_its_tokens_alone(plain):
  batch = packed_batch("gpt", rows=16, loss_normalisation="example")
  whole = batch["decoder_loss_weights"].sum()
  batch["decoder_loss_weights"] = np.where(batch["task_ids"] == 1, batch["decoder_loss_weights"], 0)
  found, metrics = both("gpt", batch=batch)
  share = batch["decoder_loss_weights"].sum() / whole  # by all the batch's weight, not by the task's own
  assert plain[0]["task_gradient_norm"][1] == pytest.approx(float(metrics["gradient_norm"]) * share, rel=1e-5)
  assert found["task_gradient_share"].tolist() == [0, 1, 0]
  assert found["task_gradient_cosine"][1] == pytest.approx(1, abs=1e-6)


def test_on_eight_devices_and_in_microbatches_they_are_the_same(plain):
  found, metrics = both("gpt", "all", accumulation_steps=2)
  for name, value in found.items():
    np.testing.assert_allclose(value, plain[0][name], rtol=2e-4, atol=1e-6, err_msg=name)
  assert metrics["gradient_norm"] == pytest.approx(float(plain[1]["gradient_norm"]), rel=1e-4)


@pytest.mark.slow
def test_with_dropout_they_are_of_the_steps_own_draw():
  found, metrics = both("t5", dropout=0.3)
  added = (found["task_gradient_norm"] * found["task_gradient_cosine"]).sum()
  assert added == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)


FEW = {"train.steps": 5, "train.log_every_steps": 4, "data.mixture": {"domain": 0.4, "tasks": 0.6}}


@pytest.fixture(scope="module")
def without(domain, tmp_path_factory):  # noqa: F811
  """A run that is asked for nothing."""
  workdir = tmp_path_factory.mktemp("without") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    return workdir, run(config_of(domain, **FEW), workdir)


def assert_same_params(done, other):
  pairs = zip(*(jax.tree.leaves(jax.device_get(one.params)) for one in (done, other)), strict=True)
  assert all((a == b).all() for a, b in pairs)


def test_asked_for_they_are_recorded_and_change_nothing(domain, without, tmp_path, one_cpu):  # noqa: F811
  asked = run(config_of(domain, **FEW, **{"train.task_gradients_every_steps": 3}), tmp_path / "asked")
  assert_same_params(asked, without[1])
  assert [record["step"] for record in read_metrics(without[0])] == [4, 5]
  records = {record["step"]: record for record in read_metrics(tmp_path / "asked")}
  assert list(records) == [3, 4, 5] and "task_gradient_share" not in records[4]
  shares, cosines = records[3]["task_gradient_share"], records[3]["task_gradient_cosine"]
  assert shares.keys() == records[3]["task_weight"].keys() and sum(shares.values()) == pytest.approx(1)
  added = sum(records[3]["task_gradient_norm"][name] * cosines[name] for name in cosines)
  assert added == pytest.approx(records[3]["gradient_norm"], rel=1e-4)
  with pytest.raises(ValueError, match="task_gradients_every_steps is -1; expected a number of steps"):
    task_gradients_every(config_of(domain, **{"train.task_gradients_every_steps": -1}))
