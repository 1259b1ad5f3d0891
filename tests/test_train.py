"""A run can be stopped at any time and goes on bit for bit; whatever does not belong to it is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import pretrain
from configs.base import get_config
from data.sample import write_domain
from data.tokenizer import byte_tokenizer
from models.sharding import make_mesh
from train import loop, stage
from train.checkpoint import Checkpoints
from train.evaluate import evaluate_task
from train.evaluator import Evaluator
from train.log import read_metrics
from train.recipe import load_materials

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 30, 4


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
  folder = tmp_path_factory.mktemp("domain") / "ward"
  write_domain(folder, documents=100, train=60, validation=5, test=11)
  return folder


def settings(domain, architecture="gpt", **more) -> dict[str, object]:
  small = {"gpt": {"layers": 1}, "t5": {"encoder_layers": 1, "decoder_layers": 1}}[architecture]
  values = {"domain": str(domain), "general": "", "tokenizer.path": "bytes", "train.steps": STEPS}
  values |= {"train.checkpoint_every_steps": EVERY, "train.log_every_steps": 1, "data.batch_size": 4}
  values |= {"data.decoder_length": 128, "data.encoder_length": 128, "optimizer.warmup_steps": 5}
  return {
    **values,
    "model.overrides": {**small, "embed_dim": 32},
    "data.mixture": {"domain": 0.5, "tasks": 0.5},
    **more,
  }


def config_of(domain, architecture="gpt", **more):
  config = pretrain.get_config(architecture)
  with config.unlocked():
    for key, value in settings(domain, architecture, **more).items():
      config.update_from_flattened_dict({key: value}) if not isinstance(value, dict) else None
    config.model.overrides.update(settings(domain, architecture)["model.overrides"])
    config.data.mixture = settings(domain, architecture, **more)["data.mixture"]
    config.mesh.data = 1
  return config.lock()


@pytest.fixture
def one_cpu(monkeypatch):
  """Makes meshes of one device, as a user's CPU has."""
  monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


def run(config, workdir):
  return loop.train(config, workdir, load_materials(config, Path(workdir)), "test")


def batches_of(workdir) -> dict[int, str]:
  return {record["step"]: record["batch"] for record in read_metrics(workdir)}


def params_of(run):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(run.params))]


def child(domain, workdir, architecture) -> subprocess.Popen:
  """Starts the same training, on one device, in a process of its own."""
  script = (
    "import sys\n"
    "from pathlib import Path\n"
    "import jax\n"
    "from models.sharding import make_mesh\n"
    "from tests.test_train import config_of, loop, run\n"
    "loop.make_mesh = lambda sizes: make_mesh(sizes, jax.devices()[:1])\n"
    "run(config_of(Path(sys.argv[1]), sys.argv[3]), sys.argv[2])\n"
  )
  command = [sys.executable, "-c", script, str(domain), str(workdir), architecture]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # conftest's XLA_FLAGS, too: the same compiler, the same bits
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("architecture", "kills"), [("gpt", (3, 14)), ("t5", (13,))])
def test_killed_and_started_again_it_is_the_uninterrupted_run(domain, tmp_path, one_cpu, architecture, kills):
  straight = run(config_of(domain, architecture), tmp_path / "straight")
  workdir = tmp_path / "killed"
  for at in kills:
    process = child(domain, workdir, architecture)
    deadline = time.time() + 240
    while not any(record["step"] >= at for record in read_metrics(workdir)):
      assert process.poll() is None and time.time() < deadline, process.communicate()[0]
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert 0 < Checkpoints(workdir).latest() < STEPS  # it goes on from a checkpoint, and has something to do
  resumed = run(config_of(domain, architecture), workdir)
  for a, b in zip(params_of(straight), params_of(resumed), strict=True):
    assert (a == b).all()
  assert batches_of(workdir) == batches_of(tmp_path / "straight")
  assert len(batches_of(workdir)) == STEPS
  assert resumed.record["tokens"] == straight.record["tokens"]
  assert resumed.record["counts"] == straight.record["counts"]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"lora.rank": 4, "lora.targets": "quary$"}, "targets='quary.' matches no parameter"),
    ({"lora.rank": -1, "lora.rank_stabilised": True}, "lora.rank is -1; expected 1 or more"),
    ({"lora.rank": 4, "optimizer.name": "muon"}, "'muon', but no matrix of a layer is trained"),
    ({"train.frozen": "embed["}, "frozen='embed.' is no regular expression .unterminated"),
    ({"train.frozen": "embbed"}, "frozen='embbed' matches no parameter"),
    ({"optimizer.name": "adafactor", "optimizer.moments_dtype": "bfloat16"}, "no moments to keep"),
    ({"optimizer.name": "adafactor", "optimizer.moments_dtype": "int8"}, "no moments to keep"),
    ({"optimizer.learning_rate": -1e-3}, "learning_rate is -0.001; expected 0"),
    ({"optimizer.offload": "hbm"}, "optimizer.offload is 'hbm'"),
    ({"architecture": "t5", "model.attention": "blockwise", "model.dropout": 0.1}, "'blockwise', which has no dropout"),
    ({"model.remat": "qvk"}, "model.remat is 'qvk'; known: .*qkv"),
    ({"model.dtype": "bf16"}, "model.dtype is 'bf16'; known: .*bfloat16"),
    ({"train.z_loss": -1.0}, "z_loss is -1.0; expected 0 or more"),
    ({"data.batch_size": 5, "train.accumulation_steps": 2}, "batch_size is 5: expected a multiple of 2"),
  ],
)
def test_what_could_not_be_trained_is_refused_before_anything_is(settings, message, one_cpu):
  config = get_config()
  config.update_from_flattened_dict(settings)
  with pytest.raises(ValueError, match=message):
    loop.check_config(config, byte_tokenizer())


@pytest.mark.parametrize(
  ("schedule", "steps", "said"),
  [
    ("constant", 100, "warms up for 100 steps, and the stage has 100: it never reaches its peak"),
    ("constant", 101, ""),
    ("cosine", 100, "warms up for 100 steps, and the stage has 100: it never comes down from a peak"),
    ("rsqrt", 100, ""),  # has no warm-up
  ],
)
def test_a_stage_that_ends_in_its_warm_up_is_told(schedule, steps, said):
  config = get_config()
  config.optimizer.schedule, config.train.steps = schedule, steps
  found = loop.still_warming_up(config)
  assert found.endswith(said) and bool(found) == bool(said)


def test_encoders_and_decoders_of_unlike_depth_can_be_trained(one_cpu):
  config = get_config()
  config.architecture = "t5"
  with config.unlocked():
    config.model.overrides.update({"encoder_layers": 3, "decoder_layers": 2})
  loop.check_config(config, byte_tokenizer())


def test_a_finished_run_does_nothing(domain, tmp_path, one_cpu, capsys):
  first = run(config_of(domain, **{"train.steps": 4}), tmp_path)
  before = batches_of(tmp_path)
  again = run(config_of(domain, **{"train.steps": 4}), tmp_path)
  assert "4 of 4 steps are done" in capsys.readouterr().out
  assert batches_of(tmp_path) == before and again.record == first.record
  assert all((a == b).all() for a, b in zip(params_of(first), params_of(again), strict=True))


def test_another_config_or_input_is_refused_with_the_difference(domain, tmp_path, one_cpu):
  run(config_of(domain, **{"train.steps": 2}), tmp_path)
  files = [tmp_path / "config.json", tmp_path / "tasks.json", *sorted((tmp_path / "tokenizer").iterdir())]
  before = [file.read_bytes() for file in files]
  with pytest.raises(ValueError, match=r"data.batch_size: 4 then, 2 now"):
    run(config_of(domain, **{"train.steps": 2, "data.batch_size": 2}), tmp_path)
  other = tmp_path / "other domain"
  write_domain(other, seed=1, documents=100, train=60, validation=5, test=11)
  with pytest.raises(ValueError, match="source.domain"):
    run(config_of(other, **{"train.steps": 2}), tmp_path)
  assert [file.read_bytes() for file in files] == before  # what is refused leaves the model as it was


def test_init_from_takes_parameters_only(domain, tmp_path, one_cpu, capsys):
  first = run(config_of(domain, **{"train.steps": 2}), tmp_path / "first")
  second = run(config_of(domain, **{"train.steps": 1, "init_from": str(tmp_path / "first")}), tmp_path / "second")
  assert f"parameters from {tmp_path / 'first'}" in capsys.readouterr().out
  assert second.record["steps"] == 1
  # One step of warm-up from rate 0 changes nothing: they are the first run's.
  assert all((a == b).all() for a, b in zip(params_of(first), params_of(second), strict=True))
  with pytest.raises(ValueError, match="are not those of"):
    wrong = config_of(domain, **{"init_from": str(tmp_path / "first")})
    with wrong.unlocked():
      wrong.model.overrides.layers = 2
    run(wrong, tmp_path / "third")
  run(config_of(domain, **{"train.steps": 1, "init_from": str(tmp_path / "first")}), tmp_path / "third")  # mended
  with pytest.raises(FileNotFoundError, match="no model in"):
    run(config_of(domain, **{"init_from": str(tmp_path / "nowhere")}), tmp_path / "fourth")


def test_evaluation_counts_each_example_once_and_twice_the_same(domain, tmp_path, one_cpu):
  config = config_of(domain, **{"train.steps": 1})
  done = run(config, tmp_path)
  tokenizer, tasks = stage.read_tokenizer(tmp_path), stage.read_tasks(tmp_path)
  results = []
  with config.unlocked(), jax.set_mesh(done.mesh):
    config.evaluate.max_new_tokens = 5
    for size in (4, 4, 11):  # 11 rows do not divide by 4
      config.evaluate.batch_size = size
      evaluator = Evaluator(config, done.model, done.params, tokenizer)
      results.append({name: evaluate_task(evaluator, task, "test") for name, task in tasks.items()})
  for name, found in results[0].items():
    for other in (result[name] for result in results[1:]):
      assert other.samples == found.samples and (other.parts == found.parts).all()
      now, then = (stage.flat(one.metrics) for one in (other, found))
      # Probabilities are sums whose order depends on a batch's shape.
      for key in now.keys() | then.keys():
        if key.startswith("calibration.") and isinstance(then[key], (float, list)):
          assert np.allclose(now[key], then[key], atol=1e-4), key
        else:
          assert now[key] == then[key], key
  assert all(found.metrics["n"] == 11 and found.parts.shape[:2] == (1, 11) for found in results[0].values())


def test_metrics_have_what_a_user_looks_for(domain, tmp_path, one_cpu):
  run(config_of(domain, **{"train.steps": 3}), tmp_path)
  record = read_metrics(tmp_path)[-1]
  assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "task_loss", "weight"} <= set(record)
  assert {"domain", "urgency", "instructions"} >= set(record["task_loss"]) and len(list(tmp_path.glob("events.*"))) == 1
  assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 3


def test_a_checkpoint_without_its_inputs_position_is_refused(domain, tmp_path, one_cpu, monkeypatch):
  run(config_of(domain, **{"train.steps": 2}), tmp_path)
  restored = Checkpoints.restore_run
  monkeypatch.setattr(Checkpoints, "restore_run", lambda *a: {k: v for k, v in restored(*a).items() if k != "stream"})
  with pytest.raises(ValueError, match="checkpoint 2 in .* lacks .'stream'"):
    run(config_of(domain, **{"train.steps": 2}), tmp_path)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_made_ahead_are_the_same_in_the_same_order(domain, tmp_path, count):
  from data.pipeline import build_stream

  config = config_of(domain)
  materials = load_materials(config, tmp_path)
  straight, threaded = (build_stream(config, materials.tokenizer, materials.domain, None, {}) for _ in range(2))
  for batch, state in loop.ahead(threaded, count, 8):
    expected = next(straight)
    assert all((batch[key] == expected[key]).all() for key in expected) and state == straight.state()
