"""Steps that would spoil a run are skipped, bit for bit; a run that only skips ends at its last good step."""

import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sharding import make_mesh, on_mesh, param_shardings
from tests.conftest import FORMS, distinct_params, packed_batch, small_model
from tests.test_step import MESHES, optimizer_of
from tests.test_train import config_of, domain, loop, one_cpu, params_of, run  # noqa: F401  fixtures
from train.checkpoint import Checkpoints
from train.exits import EXIT_UNSTABLE, Stopped
from train.log import read_metrics
from train.step import LEAST, all_trained, make_gradients, make_shard_map_step, make_step, new_norms


def scaled(factor: float):
  """Returns a reduction that multiplies the gradients, as a fault of a device would."""
  return lambda both: (jax.tree.map(lambda g: g * factor, both[0]), both[1])


def steps_of(form: str, mesh_name: str, optimizer: str, **settings):
  """Returns the mesh, a state, and `(factor) -> step` that multiplies gradients, compiled once."""
  shape = MESHES[mesh_name]
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: int(np.prod(shape))])
  model, transform = small_model(form), optimizer_of(optimizer)
  with jax.set_mesh(mesh):
    params = distinct_params(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    state = {"params": params, "opt": jax.jit(transform.init)(params), "step": jnp.int32(0)}

  @jax.jit
  def step(state, batch, factor):
    make = {"seed": 0, "tasks": 2, "chunk_tokens": 16, "reduce": scaled(factor)}
    return make_step(model, transform, **make, **settings)(state, batch)

  return mesh, state, lambda factor: lambda state, batch: step(state, batch, np.float32(factor))


def bits(state) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get((state["params"], state["opt"])))]


@pytest.mark.parametrize(
  ("form", "mesh_name", "optimizer"), [("gpt", "1", "muon"), ("t5", "1", "adafactor"), ("gpt", "all", "adamw")]
)
def test_a_gradient_that_is_not_finite_changes_nothing(form, mesh_name, optimizer):
  mesh, state, step_with = steps_of(form, mesh_name, optimizer)
  with jax.set_mesh(mesh):
    batch, good = on_mesh(packed_batch(FORMS[form][0])), step_with(1.0)
    state, metrics = good(state, batch)
    before = bits(state)
    assert metrics["skipped"] == 0
    for factor in (np.nan, np.inf, 1e30):
      state, metrics = step_with(factor)(state, batch)
      assert metrics["skipped"] == 1 and bits(state) == before
    assert state["step"] == 4  # the next batch, another dropout
    after, metrics = good(state, batch)
    straight, _ = good({**state, "step": jnp.int32(1)}, batch)
    assert metrics["skipped"] == 0 and bits(after) == bits(straight) != before


def test_a_spike_is_skipped_once_it_is_known_what_is_usual():
  mesh, state, step_with = steps_of("gpt", "1", "adamw", spike_factor=10.0)
  with jax.set_mesh(mesh):
    batch, good, spike = on_mesh(packed_batch("gpt")), step_with(1.0), step_with(30.0)
    state["norms"] = jnp.asarray(new_norms())
    norm = good(state, batch)[1]["gradient_norm"]
    known = {**state, "norms": state["norms"].at[-LEAST:].set(norm)}
    few = {**state, "norms": state["norms"].at[-LEAST + 1 :].set(norm)}
    assert spike(few, batch)[1]["skipped"] == 0
    after, metrics = spike(known, batch)
    assert metrics["skipped"] == 1 and bits(after) == bits(known)
    assert (after["norms"] == known["norms"]).all()  # what is skipped is not usual
    after, metrics = good(known, batch)
    assert metrics["skipped"] == 0 and after["norms"][-1] == norm and (after["norms"] > 0).sum() == LEAST + 1


def test_the_state_is_donated_whole():
  mesh, state, step_with = steps_of("gpt", "1", "adamw")
  with jax.set_mesh(mesh):
    step = jax.jit(step_with(1.0), donate_argnums=0)
    program = step.lower(state, on_mesh(packed_batch("gpt"))).compile()
  held = sum(leaf.nbytes for leaf in jax.tree.leaves((state["params"], state["opt"])))
  assert program.memory_analysis().alias_size_in_bytes >= held


def poisoned(monkeypatch, bad: set[int]) -> None:
  """Makes the loss weights of some batches, counted from the start of a process, not finite."""
  lay_out, seen = loop.on_mesh, []

  def poison(batch):
    seen.append(1)
    if len(seen) in bad:
      batch["decoder_loss_weights"][0] = np.where(batch["decoder_loss_weights"][0] > 0, np.nan, 0)
    return lay_out(batch)

  monkeypatch.setattr(loop, "on_mesh", poison)


def test_a_bad_batch_is_passed_over_and_written_out(domain, tmp_path, one_cpu, monkeypatch):  # noqa: F811
  poisoned(monkeypatch, {6})
  run(config_of(domain, **{"train.steps": 10}), tmp_path)
  records = {record["step"]: record for record in read_metrics(tmp_path)}
  assert records[6]["loss"] is None and records[7]["loss"] > 0
  assert [records[step]["skipped"] for step in (5, 6, 10)] == [0, 1, 1]
  assert records[6]["learning_rate"] == records[7]["learning_rate"]  # a skipped step is none for the schedule
  (file,) = (tmp_path / "anomalies").iterdir()
  first, *rows = [json.loads(line) for line in file.read_text().splitlines()]
  assert file.name == "step_6.jsonl" and first["step"] == 6 and first["loss"] == "nan"
  examples = [example for row in rows for example in row["examples"]]
  assert len(rows) == 4 and np.isnan(rows[0]["examples"][0]["weights"]).any()
  for example in examples:  # where it is said to be from, there it stands
    if ", tokens " not in example["from"]:
      path, _, line = example["from"].rpartition(":")
      row = json.loads(Path(path).read_text().splitlines()[int(line) - 1])
      assert row["target"] in example["decoder_target_text"], example
  assert all(".jsonl" in example["from"] for example in examples)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_run(10)["skipped"] == {"total": 1, "in_a_row": 0}


@pytest.mark.parametrize("limit", [1, 4])
def test_a_run_that_only_skips_ends_at_its_last_good_step(domain, tmp_path, one_cpu, monkeypatch, limit):  # noqa: F811
  config = config_of(domain, **{"train.steps": 12, "train.max_skipped_steps": limit})
  straight = run(config, tmp_path / "straight")
  with monkeypatch.context() as patch:
    poisoned(patch, set(range(7, 7 + limit)))
    with pytest.raises(Stopped, match=f"{limit} steps in a row after step 6") as stopped:
      run(config, tmp_path / "run")
  assert stopped.value.code == EXIT_UNSTABLE
  assert len(list((tmp_path / "run" / "anomalies").iterdir())) == limit
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.latest() == 6
    saved = checkpoints.restore_run(6)
    assert saved["stream"]["batches"] == 6 and "skipped" not in saved
  resumed = run(config, tmp_path / "run")  # what made the gradients bad is gone
  assert all((a == b).all() for a, b in zip(params_of(straight), params_of(resumed), strict=True))
  assert resumed.record["tokens"] == straight.record["tokens"]


@pytest.mark.parametrize("where", ["params", "opt"])
def test_a_state_that_is_not_finite_is_not_saved(where, one_device):
  saved = []
  state = {"params": {"w": jnp.ones(3)}, "opt": {"mu": jnp.ones(3), "count": jnp.int32(1)}}
  checkpoints = types.SimpleNamespace(save=lambda *arguments: saved.append(arguments))
  loop.save_checkpoint(checkpoints, state, {"steps": 3}, "test")
  assert len(saved) == 1
  state[where] = jax.tree.map(lambda x: x.at[0].set(jnp.inf) if x.ndim else x, state[where])
  with pytest.raises(Stopped, match="after step 4; nothing is saved") as stopped:
    loop.save_checkpoint(checkpoints, state, {"steps": 4}, "test")
  assert stopped.value.code == EXIT_UNSTABLE and len(saved) == 1


def test_bad_settings_say_what_is_expected(domain, tmp_path, one_cpu):  # noqa: F811
  for key, value in (("max_skipped_steps", 0), ("spike_factor", 0.5), ("watchdog_seconds", -1.0)):
    with pytest.raises(ValueError, match=f"train.{key} is {value}; expected"):
      run(config_of(domain, **{f"train.{key}": value}), tmp_path / key)


def constant_loss_model():
  """A model whose token loss is 5 where the input is 0, and 2 where it is 1 (two words, the target is the first)."""
  logits = -np.log(np.exp([5.0, 2.0]) - 1)

  def features(params, batch, key):
    table_ND = jnp.stack([params["logit"], jnp.zeros(2)], axis=1)
    return jax.nn.one_hot(batch["decoder_input_tokens"], 2) @ table_ND

  model = types.SimpleNamespace(
    features=features,
    head=lambda params: jnp.eye(2),
    logit_cap=0.0,
    config=types.SimpleNamespace(vocab_size=2, dropout=0.0),
  )
  return model, {"logit": jnp.asarray(logits, jnp.float32)}


@pytest.mark.parametrize(
  ("devices", "kind", "microbatches"), [(1, "jit", 1), (1, "jit", 2), (2, "jit", 1), (4, "jit", 1), (4, "shard_map", 1)]
)
def test_3_tokens_at_loss_5_and_97_at_2_give_2_09(devices, kind, microbatches):
  shape = (4, 100)
  batch = {key: np.zeros(shape, np.int32) for key in ("decoder_input_tokens", "decoder_target_tokens", "task_ids")}
  weights = np.zeros(shape, np.float32)
  weights[0, :3] = 1  # three tokens on the first device (or in the first microbatch), 97 on the next, none on others
  weights[1, :97], batch["decoder_input_tokens"][1] = 1, 1
  batch |= {"decoder_loss_weights": weights, "decoder_segment_ids": (weights > 0).astype(np.int32)}
  mesh, (model, params) = make_mesh({"data": devices}, jax.devices()[:devices]), constant_loss_model()
  settings = {"seed": 0, "tasks": 1, "accumulation_steps": microbatches}
  transform = optimizer_of("adamw")
  with jax.set_mesh(mesh):
    state = {"params": params, "opt": transform.init(params), "step": jnp.int32(0)}
    make = make_step if kind == "jit" else lambda *a, **s: make_shard_map_step(*a, mesh, **s)
    _, metrics = jax.jit(make(model, transform, **settings))(state, on_mesh(batch))
  assert float(metrics["loss"]) == pytest.approx(2.09, rel=1e-5) and metrics["weight"] == 100
  # d loss / d logit is -(1 - exp(-loss)) for each token: their sum over all tokens, divided once.
  slopes = np.array([3 * (1 - np.exp(-5.0)), 97 * (1 - np.exp(-2.0))]) / 100
  assert float(metrics["gradient_norm"]) == pytest.approx(np.linalg.norm(slopes), rel=1e-5)


def test_a_microbatch_without_supervised_tokens_counts_nothing():
  mesh, state, _ = steps_of("gpt", "1", "adamw")
  model = small_model("gpt")
  batch = packed_batch("gpt")
  batch["decoder_loss_weights"][1::2] = 0  # the second microbatch
  half = {key: value[::2] for key, value in batch.items()}
  results = []
  with jax.set_mesh(mesh):
    for rows, microbatches in ((half, 1), (batch, 2)):
      step = make_step(model, optimizer_of("adamw"), seed=0, tasks=2, accumulation_steps=microbatches)
      results.append(jax.device_get(jax.jit(step)(state, on_mesh(rows))))
  for a, b in zip(*(jax.tree.leaves(state["params"]) for state, _ in results), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
  assert results[1][1]["skipped"] == 0 and results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-6)


@pytest.mark.parametrize("form", ["gpt", "gpt2", "gemma2", "t5", "t5-v1.0"])
def test_activations_of_1e4_stay_finite_in_bfloat16(form, one_device):
  model = small_model(form, dtype="bfloat16")

  def enlarge(path, leaf):
    name = jax.tree_util.keystr(path)
    return leaf * 1e4 if any(part in name for part in ("tokens", "'out'", "'down'")) else leaf

  params = jax.tree_util.tree_map_with_path(enlarge, distinct_params(model))
  losses = {"z_loss": 1e-4, "label_smoothing": 0.0, "chunk_tokens": 16}
  gradients = make_gradients(model, tasks=2, losses=losses, accumulation_steps=1, join=all_trained)
  batch = on_mesh(packed_batch(FORMS[form][0]))
  features = model.features(params, batch, None)
  grads, sums = jax.jit(gradients)(params, {}, batch, None)
  assert features.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((features, grads, sums)):
    assert jnp.isfinite(leaf.astype(jnp.float32)).all()
  assert float(sums["nll"]) > 0
