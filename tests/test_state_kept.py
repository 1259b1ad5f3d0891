"""Optimizers in whole runs: what a checkpoint holds, going on bit for bit, state in the host's memory."""

import jax
import numpy as np
import pytest

from models.sharding import by_path, make_mesh
from tests.test_train import EVERY, batches_of, config_of, domain, one_cpu, params_of, run  # noqa: F401
from train import loop, stage
from train.checkpoint import Checkpoints
from train.log import read_metrics
from train.moments import check_memory

STEPS = EVERY + 3
FREE = {"optimizer.name": "schedule_free", "optimizer.schedule": "constant", "optimizer.moments_dtype": "bfloat16"}
FREE |= {"optimizer.warmup_steps": 1, "train.steps": STEPS}
AWAY = {"optimizer.name": "muon", "optimizer.moments_dtype": "int8", "optimizer.offload": "pinned_host"}
AWAY |= {"optimizer.warmup_steps": 1, "train.steps": STEPS}


@pytest.fixture(scope="module")
def hosted():
  """Skips where this version of JAX cannot place arrays of several CPU devices in the host's memory."""
  try:
    with jax.set_mesh(make_mesh({"data": 8})):
      rows = jax.device_put(np.ones(8, np.float32), jax.P("data"))
      jax.block_until_ready(jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))(rows))
  except jax.errors.JaxRuntimeError as error:
    pytest.skip(f"jax {jax.__version__}: {error}")


def stopped_and_resumed(config, workdir, monkeypatch):
  """Runs to the end, and again with a power cut after the first checkpoint."""
  straight = run(config, workdir / "straight")
  checksum, seen = loop.checksum_of, []

  def power_cut(batch):
    seen.append(0)
    if len(seen) == EVERY + 2:
      raise RuntimeError("power cut")
    return checksum(batch)

  monkeypatch.setattr(loop, "checksum_of", power_cut)
  with pytest.raises(RuntimeError, match="power cut"):
    run(config, workdir / "stopped")
  monkeypatch.setattr(loop, "checksum_of", checksum)
  resumed = run(config, workdir / "stopped")
  assert batches_of(workdir / "stopped") == batches_of(workdir / "straight")
  assert all((a == b).all() for a, b in zip(params_of(straight), params_of(resumed), strict=True))
  return straight


def test_schedule_free_evaluates_stores_and_hands_on_the_average(domain, tmp_path, one_cpu, monkeypatch):  # noqa: F811
  config = config_of(domain, **FREE)
  done = stopped_and_resumed(config, tmp_path, monkeypatch)
  with jax.set_mesh(done.mesh), Checkpoints(tmp_path / "straight") as checkpoints:
    loaded = stage.load_params(tmp_path / "straight", done.model, done.mesh)
    state = checkpoints.restore_state(STEPS, loop.state_like(config, done.model, done.mesh))
  iterate = [leaf for path, leaf in by_path(state["opt"]).items() if "/z/" in path]
  assert len(iterate) == len(params_of(done))
  for stored, finished in zip(jax.tree.leaves(loaded), params_of(done), strict=True):
    assert (np.asarray(stored) == finished).all()
  assert any(np.abs(np.asarray(a) - b).max() > 1e-4 for a, b in zip(iterate, params_of(done), strict=True))
  losses = [record["loss"] for record in read_metrics(tmp_path / "straight")]
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_state_in_the_hosts_memory_is_the_same_run(domain, tmp_path, one_cpu, hosted, monkeypatch):  # noqa: F811
  away = stopped_and_resumed(config_of(domain, **AWAY), tmp_path, monkeypatch)
  here = run(config_of(domain, **{**AWAY, "optimizer.offload": ""}), tmp_path / "here")
  assert all((a == b).all() for a, b in zip(params_of(away), params_of(here), strict=True))


def test_the_state_lies_in_the_hosts_memory_between_steps(domain, tmp_path, hosted):  # noqa: F811
  config = config_of(domain, **AWAY)
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  with config.unlocked():
    config.model.overrides.update({"layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "mlp_dim": 64})
  from data.tokenizer import byte_tokenizer

  model = loop.build_model(config, byte_tokenizer())
  with jax.set_mesh(mesh):
    state = loop.new_state(config, stage.scratch_params(config, model, mesh), mesh)
    like = loop.state_like(config, model, mesh)
  made, said = by_path(state["opt"]), by_path(like["opt"])
  for path, leaf in made.items():
    assert said[path].sharding.memory_kind == leaf.sharding.memory_kind, path
    assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else "device"), path
    assert said[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path


def test_a_memory_that_is_not_there_is_refused():
  mesh = make_mesh({"data": 8})
  check_memory("", mesh)
  with pytest.raises(ValueError, match="offload is 'hbm'; .* has .*'pinned_host'"):
    check_memory("hbm", mesh)
