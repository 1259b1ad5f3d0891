"""What a run tells of its tasks: whose a step's gradient is, how each does on its validation split, the best step."""

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tasks import load_domain
from data.tokenizer import byte_tokenizer
from models.sharding import make_mesh, on_mesh, param_shardings
from tests.conftest import distinct_params, packed_batch, small_model
from tests.test_runs import Job, assert_same_run, finish
from tests.test_step import MESHES, optimizer_of
from tests.test_train import config_of, domain, run  # noqa: F401  a fixture
from train import loop, stage, upkeep, validation
from train.checkpoint import Checkpoints
from train.evaluate import evaluate_task
from train.evaluator import Evaluator
from train.exits import Stopped
from train.log import read_metrics, read_validation
from train.meter import Meter
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
  mesh, state, task_gradients, _ = programs("gpt", "all", 0.0, 2)
  with jax.set_mesh(mesh):
    batch = on_mesh(packed_batch("gpt", rows=16, loss_normalisation="example"))
    found = jax.device_get(task_gradients(state, batch))
  for name, value in found.items():
    np.testing.assert_allclose(value, plain[0][name], rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_with_dropout_they_are_of_the_steps_own_draw():
  found, metrics = both("t5", dropout=0.3)
  added = (found["task_gradient_norm"] * found["task_gradient_cosine"]).sum()
  assert added == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)


# Runs.

FEW = {"train.steps": 6, "train.log_every_steps": 4, "data.mixture": {"domain": 0.4, "tasks": 0.6}}
FEW |= {"train.checkpoint_every_steps": 1, "train.keep_checkpoints": 100, "evaluate.max_new_tokens": 4}
ASKED = {"train.evaluate_every_steps": 2, "train.best_metric": "urgency"}
VALUES = {2: 0.4, 4: 0.8, 6: 0.8}  # by step, in place of what a model of so few steps reaches by chance


def one_device(patch):
  patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


def known_values(patch):
  """Lets the urgency of each step be one of VALUES; all else is measured as it is."""
  better = validation.Validation._better
  patch.setattr(
    validation.Validation,
    "_better",
    lambda self, best, step, found: better(self, best, step, {**found, "value": VALUES[step]}),
  )


@pytest.fixture(scope="module")
def runs(domain, tmp_path_factory):  # noqa: F811
  """A run that is asked for nothing, and one that is asked for everything: name -> its folder and what it returned."""
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    one_device(patch)
    known_values(patch)
    for name, more in (("plain", {}), ("asked", ASKED | {"train.task_gradients_every_steps": 3})):
      workdir = tmp_path_factory.mktemp(name) / "run"
      found[name] = workdir, run(config_of(domain, **FEW, **more), workdir)
  return found


@pytest.fixture
def one_cpu(monkeypatch):
  one_device(monkeypatch)
  known_values(monkeypatch)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]


def stored(workdir, step):
  """Returns the parameters of a step, as they were saved."""
  config, mesh = stage.read_config(workdir), make_mesh({}, jax.devices()[:1])
  with jax.set_mesh(mesh), Checkpoints(workdir) as checkpoints:
    model = loop.build_model(config, stage.read_tokenizer(workdir))
    return leaves(checkpoints.restore_params(step, stage.params_like(model, mesh)))


def assert_equal(first, second):
  assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_asked_for_gradients_are_recorded(runs):
  records = {record["step"]: record for record in read_metrics(runs["asked"][0])}
  assert list(records) == [3, 4, 6] and "task_gradient_share" not in records[4]
  shares, cosines = records[3]["task_gradient_share"], records[3]["task_gradient_cosine"]
  assert shares.keys() == records[3]["task_weight"].keys() and sum(shares.values()) == pytest.approx(1)
  added = sum(records[3]["task_gradient_norm"][name] * cosines[name] for name in cosines)
  assert added == pytest.approx(records[3]["gradient_norm"], rel=1e-4)


def test_measuring_changes_nothing(runs):
  (plain, _), (asked, _) = runs["plain"], runs["asked"]
  for step in (1, 3, 6):  # before, between and after measurements
    assert_equal(stored(plain, step), stored(asked, step))
  losses, others = ({r["step"]: r["loss"] for r in read_metrics(folder)} for folder in (plain, asked))
  assert losses == {step: others[step] for step in losses} and list(losses) == [4, 6]
  assert not (plain / "validation.jsonl").exists()


def test_every_task_is_measured_on_its_validation_split_and_the_best_step_is_the_stages(runs):
  workdir, done = runs["asked"]
  records = read_validation(workdir)
  assert [record["step"] for record in records] == [2, 4, 6]
  assert all(record["skills"].keys() == {"urgency", "instructions"} for record in records)
  assert all(found["n"] == 5 for record in records for found in record["skills"].values())  # each row once
  assert records[0]["skills"]["instructions"]["metric"] == "rougeL" and "macro_f1" in records[0]["skills"]["urgency"]
  best = {key: done.record["best"][key] for key in ("step", "skill", "value")}
  assert best == {"step": 4, "skill": "urgency", "value": 0.8} and done.record["steps"] == 6
  assert_equal(leaves(done.params), stored(workdir, 4))
  with jax.set_mesh(done.mesh):
    assert_equal(leaves(stage.load_params(workdir, done.model, done.mesh)), stored(workdir, 4))
    with Checkpoints(workdir) as checkpoints:
      assert checkpoints.latest() == 6 and stage.identity(workdir)["steps"] == 4
    tasks, tokenizer = stage.read_tasks(workdir), stage.read_tokenizer(workdir)
    config = config_of(stage.read_config(workdir).domain, **FEW)
    evaluator = Evaluator(config, done.model, done.params, tokenizer)
    for name, task in tasks.items():  # measured a second time it is the same
      again = evaluate_task(evaluator, task, "validation").metrics
      assert {key: again[key] for key in records[1]["skills"][name]} == records[1]["skills"][name]


def cut(workdir, step: int, folder):
  """Returns a copy of a run as it stood when the checkpoint of a step was its newest, its logs further."""
  copy = Path(shutil.copytree(workdir, folder / "run"))
  for later in upkeep.steps(copy / "checkpoints"):
    if later > step:
      shutil.rmtree(copy / "checkpoints" / str(later))
  return copy


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4, 6])
def test_a_run_that_goes_on_neither_loses_nor_repeats_a_measurement(domain, runs, tmp_path, one_cpu, step):  # noqa: F811
  workdir = cut(runs["asked"][0], step, tmp_path)
  again = run(config_of(domain, **FEW, **ASKED), workdir)
  assert read_validation(workdir) == read_validation(runs["asked"][0])
  assert again.record["best"] == runs["asked"][1].record["best"]
  assert_equal(stored(workdir, 6), stored(runs["asked"][0], 6))
  assert_equal(leaves(again.params), leaves(runs["asked"][1].params))


def test_a_run_that_is_stopped_is_measured_when_it_goes_on(domain, runs, tmp_path, one_cpu, monkeypatch):  # noqa: F811
  """The grace of a preemption is for the checkpoint; and a measurement that was cut short is made again."""
  settings, workdir = config_of(domain, **{**FEW, **ASKED, "train.keep_checkpoints": 1}), tmp_path / "run"
  asked = iter([None, None, None, "SIGTERM"])
  with monkeypatch.context() as patch:
    patch.setattr(loop.Notice, "reached", lambda self: next(asked))
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 4"):
      run(settings, workdir)
  assert [record["step"] for record in read_validation(workdir)] == [2]
  with (workdir / "validation.jsonl").open("a") as file:
    file.write(json.dumps({"step": 4, "skills": {}}) + "\n")
  again = run(settings, workdir)
  assert read_validation(workdir) == read_validation(runs["asked"][0])
  assert_equal(leaves(again.params), leaves(runs["asked"][1].params))
  assert upkeep.steps(workdir / "checkpoints") == [4, 6] and upkeep.best_of(workdir / "checkpoints") == 4
  assert upkeep.prune(workdir / "checkpoints", 1) == []
  half = shutil.copytree(workdir / "checkpoints" / "6", workdir / "checkpoints" / "8")
  shutil.rmtree(half / "run")  # such a one does not say which is the best
  assert upkeep.best_of(workdir / "checkpoints") == 4 and upkeep.prune(workdir / "checkpoints", 1) == [half]
  (workdir / "checkpoints" / "4" / "manifest.json").unlink()
  with Checkpoints(workdir) as checkpoints:
    assert checkpoints.chosen() == 6
  shutil.rmtree(workdir / "checkpoints" / "4")
  with Checkpoints(workdir) as checkpoints:
    assert checkpoints.chosen() == 6


@pytest.mark.slow
def test_where_the_best_step_is_gone_it_is_looked_for_anew(domain, runs, tmp_path, one_cpu, capsys):  # noqa: F811
  workdir = cut(runs["asked"][0], 5, tmp_path)
  shutil.rmtree(workdir / "checkpoints" / "4")
  again = run(config_of(domain, **FEW, **ASKED), workdir)
  assert "the best step is looked for anew, from step 5 on" in capsys.readouterr().out
  assert again.record["best"]["step"] == 6 and read_validation(workdir) == read_validation(runs["asked"][0])


@pytest.mark.slow
def test_adapters_beside_the_best_step_of_another_stage(domain, runs, tmp_path, one_cpu):  # noqa: F811
  base, more = runs["asked"][0], {"lora.rank": 4, "optimizer.name": "adamw", "optimizer.learning_rate": 1e-2}
  done = run(config_of(domain, **FEW, **ASKED, **more, **{"init_from": str(base)}), tmp_path / "run")
  assert done.record["base"]["steps"] == 4 and done.record["best"]["step"] == 4
  with jax.set_mesh(done.mesh):
    assert_equal(leaves(done.params), leaves(stage.load_params(tmp_path / "run", done.model, done.mesh)))
  assert any((a != b).any() for a, b in zip(leaves(done.params), stored(base, 4), strict=True))
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.latest() == 6 and checkpoints.chosen() == 4


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"evaluate_every_steps": -1}, "evaluate_every_steps is -1; expected a number"),
    ({"best_metric": "urgency"}, "evaluate_every_steps is 0, so that no step is ever measured"),
    ({"evaluate_every_steps": 2, "best_metric": "mood"}, r"best_metric is 'mood'; expected .* \['urgency'"),
  ],
)
def test_what_cannot_be_measured_is_refused(domain, settings, message):  # noqa: F811
  config = config_of(domain, **{f"train.{key}": value for key, value in settings.items()})
  tasks = load_domain(domain).tasks
  with pytest.raises(ValueError, match=message):
    validation.check_validation(config, tasks)
  with pytest.raises(ValueError, match="task_gradients_every_steps is -1; expected a number of steps"):
    task_gradients_every(config_of(domain, **{"train.task_gradients_every_steps": -1}))
  if settings.get("evaluate_every_steps", 0) > 0:
    tasks = {name: dataclasses.replace(task, files={"train": task.files["train"]}) for name, task in tasks.items()}
    with pytest.raises(ValueError, match="none of the tasks .* has a validation split"):
      validation.check_validation(config, tasks)


def test_the_time_of_a_measurement_does_not_count_as_steps():
  meter = Meter(1, jax.devices()[:1])
  meter.count(1000)
  with meter.apart():
    time.sleep(0.3)
  assert meter.read(1)["step_ms"] < 100


@pytest.mark.slow
def test_two_processes_measure_what_one_does(domain, tmp_path):  # noqa: F811
  more = {**ASKED, "train.evaluate_every_steps": 8, "evaluate.max_new_tokens": 4, "train.keep_checkpoints": 1}
  for folder, count in (("one", 1), ("two", 2)):
    finish(domain, tmp_path / folder, count, **more)
  with Job(domain, tmp_path / "killed", 2, **more) as job:
    job.reach(12)
    job.processes[1].kill()
    assert all(job.ended()[0])
  finish(domain, tmp_path / "killed", 2, **more)
  one, two, killed = (read_validation(tmp_path / folder) for folder in ("one", "two", "killed"))
  assert killed == two and [record["step"] for record in two] == [8, 16, 24]
  for a, b in zip(one, two, strict=True):
    for name, found in a["skills"].items():
      assert found["n"] == b["skills"][name]["n"] and found["value"] == pytest.approx(
        b["skills"][name]["value"], abs=0.2
      )
  assert upkeep.best_of(tmp_path / "killed" / "checkpoints") == upkeep.best_of(tmp_path / "two" / "checkpoints")
  assert_same_run(tmp_path / "killed", tmp_path / "two")


def test_a_best_that_was_found_otherwise_is_not_compared(domain, one_cpu):  # noqa: F811
  tasks = load_domain(domain).tasks
  found = {"metric": "accuracy", "value": 0.5}

  def better(best, step, **more):
    config = config_of(domain, **ASKED, **more)
    return validation.Validation(config, tasks, loop.build_model(config, byte_tokenizer()), byte_tokenizer())._better(
      best, step, found
    )

  first = {**better(None, 2), "value": 0.95}
  assert better(first, 4) == first
  for more in ({"train.evaluate_max_examples": 3}, {"evaluate.label_score": "pmi"}, {"evaluate.candidates": 4}):
    assert better(first, 4, **more)["step"] == 4
