"""The same global batches on 1, 2 and 4 real processes (jax.distributed on loopback), straight through and resumed."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AxisType

from models.sharding import _laid, _slices, make_mesh
from tests.test_pipeline import write
from train.checkpoint import Checkpoints
from train.log import read_metrics
from train.processes import address

BATCHES, STOP = 12, 5
WORKER = """
import json, sys, zlib
import jax
count, rank, port, folder, state = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], json.loads(sys.argv[5])
if count > 1:
  jax.distributed.initialize(f"localhost:{port}", count, rank)
from jax.experimental import multihost_utils
from configs.base import get_config
from data.pipeline import build_stream
from data.tasks import load_domain
from data.tokenizer import byte_tokenizer
from models.sharding import make_mesh
from models.sharding import on_mesh

config = get_config()
with config.unlocked():
  config.data.mixture = {"domain": [0.9, 0.1], "words": 0.4}
config.train.steps = BATCHES
config.data.update({"decoder_length": 96, "batch_size": 8, "objective": "span_corruption"})
stream = build_stream(config, byte_tokenizer(), load_domain(folder), None, {})
if state:
  stream.restore(state)
sums, states = [], []
with jax.set_mesh(make_mesh(config.mesh)):
  while stream.state()["batches"] < BATCHES:
    states.append(stream.state())
    arrays = on_mesh(next(stream))
    assert all(len(array.addressable_shards) == jax.local_device_count() for array in arrays.values())
    whole = {key: multihost_utils.process_allgather(array, tiled=True) for key, array in sorted(arrays.items())}
    sums.append([zlib.crc32(array.tobytes()) for array in whole.values()])
print(json.dumps({"devices": jax.device_count(), "sums": sums, "states": states}))
"""


@pytest.fixture
def folder(tmp_path):
  """A domain of 40 documents and 16 rows."""
  write(tmp_path / "d" / "corpus.jsonl", [{"text": f"document {i} " * (i % 7 + 1)} for i in range(40)])
  (tmp_path / "d" / "tasks.json").write_text('{"words": {"kind": "generation"}}')
  for split in ("train", "test"):
    write(
      tmp_path / "d" / "words" / f"{split}.jsonl", [{"input": f"row {i}", "target": f"answer {i}"} for i in range(16)]
    )
  return tmp_path / "d"


def start(script: str, count: int, *arguments: str) -> list[tuple[int, str, str]]:
  """Runs a script in `count` processes of one device each; returns each one's exit code, output and errors."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", script, str(count), str(rank), port, *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for rank in range(count)
  ]
  try:
    ended = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def run(folder: Path, count: int, state: dict | None = None) -> list[dict]:
  """Returns what each of `count` processes saw of the stream."""
  ended = start(WORKER.replace("BATCHES", str(BATCHES)), count, str(folder), json.dumps(state))
  assert all(code == 0 for code, _, _ in ended), ended[0][2][-2000:]
  return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def test_the_same_global_batches_on_1_2_and_4_processes(folder):
  (straight,) = run(folder, 1)
  assert len(straight["sums"]) == BATCHES and straight["devices"] == 1
  assert len({tuple(sums) for sums in straight["sums"]}) == BATCHES
  four = run(folder, 4)
  assert all(seen == {**straight, "devices": 4} for seen in four)
  two = run(folder, 2, four[3]["states"][STOP])  # stopped on four processes, resumed on two
  assert all(seen["sums"] == straight["sums"][STOP:] and seen["devices"] == 2 for seen in two)


CHECK = """
import sys
import jax
count, rank, port, folders, batch_sizes = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", count, rank)
from configs.base import get_config
from data.pipeline import build_stream
from data.tasks import load_domain
from data.tokenizer import byte_tokenizer
from train.stage import check_same_everywhere

config = get_config()
with config.unlocked():
  config.data.mixture = {"domain": 1.0}
config.data.update({"decoder_length": 96, "batch_size": int(batch_sizes.split(",")[rank])})
stream = build_stream(config, byte_tokenizer(), load_domain(folders.split(",")[rank]), None, {})
try:
  check_same_everywhere(stream.fingerprint(), config)
  print("all the same")
except ValueError as error:
  print(error)
"""


@pytest.mark.parametrize(
  ("sizes", "other", "message"),
  [("8,8", False, "all the same"), ("8,4", False, "config.data.batch_size: "), ("8,8", True, "input source.domain: ")],
)
def test_processes_that_disagree_stop_before_the_first_step(folder, tmp_path, sizes, other, message):
  folders = [str(folder), str(folder)]
  if other:
    folders[1] = str(tmp_path / "other")
    shutil.copytree(folder, folders[1])
    with (tmp_path / "other" / "corpus.jsonl").open("a") as file:
      file.write('{"text": "one more document"}\n')
  ended = start(CHECK, 2, ",".join(folders), sizes)
  assert all(code == 0 and message in out for code, out, _ in ended), ended


MEASURED = """
import os, runpy, sys
import jax
count, rank, port, folders, config_file, workdir = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", count, rank)
sys.path.insert(0, os.getcwd())
os.chdir(folders.split(",")[rank])  # the same path is another folder, as on another host
from train.loop import train
from train.recipe import load_materials, run_recipe

config = runpy.run_path(config_file)["get_config"]("gpt")
config.domain = "d"
try:
  run_recipe(config, workdir)
except ValueError as error:
  print(error)
config.train.evaluate_every_steps = 1
train(config, workdir, load_materials(config, workdir))
"""


def test_processes_that_would_be_measured_on_other_rows_stop_before_the_first_step(folder, tmp_path, config_file):
  shutil.copytree(folder, tmp_path / "other" / "d")
  for place, text in ((folder, "one"), (tmp_path / "other" / "d", "another")):
    for split in ("validation", "test"):
      write(place / "words" / f"{split}.jsonl", [{"input": text, "target": text}])
  ended = start(MEASURED, 2, f"{tmp_path},{tmp_path / 'other'}", str(config_file), str(tmp_path / "run"))
  assert all("do not have the same input" in out and "input measured.words: " in out for _, out, _ in ended), ended
  # Of training either may end the other before it has spoken.
  assert all(code for code, _, _ in ended) and any("input validation.words: " in error for _, _, error in ended), ended
  assert not list((tmp_path / "run").rglob("metrics.jsonl")) and not list((tmp_path / "run").glob("stages/*"))


TOGETHER = """
import sys, time
import jax
count, rank, port = (int(word) for word in sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", count, rank)
from train import processes

def read():
  time.sleep(2 * rank)
  return f"of {rank}"

began = time.monotonic()
print(processes.together(read), processes.first(lambda: 7), time.monotonic() - began > 1.5)

def fail():
  if rank == 1:
    raise OSError("no such host")

for way in (processes.together, processes.first):
  try:
    way(fail if way is processes.together else lambda: 1 / 0)
  except (OSError, ValueError, ZeroDivisionError) as error:
    print(error)
"""


def test_each_reads_at_its_pace_and_all_hear_of_a_failure():
  ended = start(TOGETHER, 2)
  assert all(code == 0 for code, _, _ in ended), ended
  said = [[line for line in out.splitlines() if "Gloo" not in line] for _, out, _ in ended]
  assert said[0] == ["of 0 7 True", "process 1 failed; its error says why", "division by zero"]
  assert said[1] == ["of 1 7 True", "no such host", "process 0 failed; its error says why"]


CONFIG = """
from configs import base
def get_config(arg):
  config = base.get_config()
  with config.unlocked():
    config.architecture, config.domain, config.general = arg, "DOMAIN", ""
    config.data.mixture = {"domain": 0.5, "words": 0.5}
    small = {"embed_dim": 16, "heads": 2, "head_dim": 8, "mlp_dim": 32}
    gpt, t5 = {"layers": 1, "kv_heads": 2}, {"encoder_layers": 1, "decoder_layers": 1}
    config.model.overrides = small | (gpt if arg == "gpt" else t5)
    for stage in ("base", "continued"):
      config.stages[stage] = {"data": {"mixture": {"domain": 1.0}}}
  config.train.update({"steps": 3, "log_every_steps": 1, "checkpoint_every_steps": 2, "loss_chunk_tokens": 32})
  config.optimizer.update({"warmup_steps": 1, "learning_rate": 1e-2})
  config.data.update({"encoder_length": 48, "decoder_length": 48, "batch_size": 8})
  config.evaluate.update({"batch_size": 8, "max_new_tokens": 4, "corpus_tokens": 500, "max_examples": 8})
  config.arms.update({"only": "none", "without_continued": False})
  return config
"""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config_file(folder, tmp_path):
  """A config of a very small model on `folder`, for any architecture."""
  file = tmp_path / "config.py"
  file.write_text(CONFIG.replace("DOMAIN", str(folder)))
  return file


def argot(count: int, devices: int, *arguments: str, workdirs: Sequence[Path] = ()) -> list[tuple[int, str, str]]:
  """Runs `argot` in `count` processes that share so many devices; returns each one's exit code, output and errors."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = "--xla_backend_optimization_level=0"
  environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // count)}
  processes = []
  try:
    for index in range(count):
      own = {"ARGOT_COORDINATOR": f"localhost:{port}", "ARGOT_PROCESSES": str(count), "ARGOT_PROCESS": str(index)}
      command = [sys.executable, "-m", "scripts", *arguments, *(f"--workdir={w}" for w in workdirs[index : index + 1])]
      pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
      processes.append(subprocess.Popen(command, env=environment | own, cwd=ROOT, **pipes))
    ended = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def losses(workdir: Path) -> np.ndarray:
  return np.array([record["loss"] for record in read_metrics(workdir)])


def same_training(config_file: Path, folder: Path, architecture: str, count: int, devices: int, meshes: dict) -> None:
  """Trains in one process and in `count`, on each mesh, and compares."""
  for name, mesh in meshes.items():
    found = []
    for processes in (1, count):
      workdir = folder / f"{name}-{processes}"
      flags = [f"--config={config_file}:{architecture}", f"--workdir={workdir}"]
      flags += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
      ended = argot(processes, devices, "train", *flags)
      assert all(code == 0 for code, _, _ in ended), ended
      assert "step 3/3" in ended[0][1] and not any("step" in out for _, out, _ in ended[1:])
      assert (f"processes: {count} at localhost" in ended[0][1]) == (processes > 1)
      assert Checkpoints(workdir).latest() == 3 and not list(workdir.glob(".shared-*"))
      found.append(losses(workdir))
    assert len(found[0]) == 3 and found[0][2] < found[0][0]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_train_in_two_processes_is_train_in_one(config_file, tmp_path):
  same_training(config_file, tmp_path, "gpt", 2, 2, {"fsdp": {"data": 1, "fsdp": 2}})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_train_in_four_processes_is_train_in_one(config_file, tmp_path, architecture):
  meshes = {"data": {"data": 4}, "fsdp": {"data": 1, "fsdp": 4}, "both": {"data": 2, "fsdp": 2, "slices": 2}}
  one = {key: value for key, value in meshes["both"].items() if key != "slices"}
  same_training(config_file, tmp_path, architecture, 4, 4, {key: meshes[key] for key in ("data", "fsdp")})
  workdir = tmp_path / "slices"
  flags = [f"--config={config_file}:{architecture}", f"--workdir={workdir}"]
  ended = argot(4, 4, "train", *flags, *(f"--config.mesh.{axis}={size}" for axis, size in meshes["both"].items()))
  assert all(code == 0 for code, _, _ in ended), ended
  straight = tmp_path / "one"
  flags[1] = f"--workdir={straight}"
  ((code, _, error),) = argot(1, 4, "train", *flags, *(f"--config.mesh.{axis}={size}" for axis, size in one.items()))
  assert code == 0, error
  np.testing.assert_allclose(losses(straight), losses(workdir), rtol=1e-6)


@pytest.mark.slow
def test_recipe_and_evaluate_in_two_processes_are_those_in_one(config_file, folder, tmp_path):
  results = []
  for count in (1, 2):
    workdir, output = tmp_path / f"recipe-{count}", tmp_path / f"scores-{count}.json"
    ended = argot(count, 2, "recipe", f"--config={config_file}:gpt", f"--workdir={workdir}")
    assert all(code == 0 for code, _, _ in ended), ended
    ended = argot(count, 2, "evaluate", f"--model={workdir}", f"--domain={folder}", f"--output={output}")
    assert all(code == 0 for code, _, _ in ended), ended
    assert (workdir / "report.html").exists()
    results.append((json.loads((workdir / "report.json").read_text()), json.loads(output.read_text())))
  (report, scores), (report_of_two, scores_of_two) = results
  assert report["skills"] == report_of_two["skills"] and report["samples"] == report_of_two["samples"]
  for stage, skills in report["matrix"].items():
    for skill, metrics in skills.items():
      assert report_of_two["matrix"][stage][skill]["value"] == pytest.approx(metrics["value"], rel=1e-5)
  for skill, metrics in scores["skills"].items():
    assert scores_of_two["skills"][skill]["value"] == pytest.approx(metrics["value"], rel=1e-5)


@pytest.mark.slow
def test_workdirs_that_are_not_shared_stop_all_processes(config_file, tmp_path):
  ended = argot(2, 2, "train", f"--config={config_file}:gpt", workdirs=[tmp_path / "a", tmp_path / "b"])
  assert all(code == 1 and "is not shared: processes [1] of 2" in error for code, _, error in ended), ended


UNSET = {"coordinator": "", "count": 0, "index": -1}


def test_addresses_come_from_the_config_or_the_environment_and_never_in_part():
  environment = {"ARGOT_COORDINATOR": "a:1", "ARGOT_PROCESSES": "4", "ARGOT_PROCESS": "2"}
  assert address(UNSET, {}) is None
  assert address(UNSET, environment) == ("a:1", 4, 2)
  assert address({**UNSET, "index": 3}, environment) == ("a:1", 4, 3)
  assert address({**UNSET, "count": 1}, {}).count == 1
  for settings, given, message in (
    ({"count": 2}, {}, "config.processes.coordinator .* and config.processes.index .* is missing"),
    ({}, {"ARGOT_COORDINATOR": "a:1"}, "ARGOT_PROCESSES"),
    ({}, {**environment, "ARGOT_PROCESS": "4"}, "process 4 of 4"),
    ({}, {**environment, "ARGOT_PROCESSES": "many"}, "ARGOT_PROCESSES=many"),
    ({}, {**environment, "ARGOT_COORDINATOR": "a"}, "HOST:PORT"),
  ):
    with pytest.raises(ValueError, match=message):
      address({**UNSET, **settings}, given)


def test_sides_of_the_network_are_split_only_where_they_must_be():
  @dataclasses.dataclass(frozen=True)
  class Device:
    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"

  devices = [Device(i, (i % 4, i // 4 % 4, i // 16)) for i in range(64)]
  planes = _laid((4, 16), devices)
  assert all(any(len({device.coords[side] for device in row}) == 1 for side in range(3)) for row in planes)
  split = _laid((8, 8), devices)  # no sides of 4 make an 8
  assert split.shape == (8, 8) and {device.id for device in split.flat} == set(range(64))


def test_slices_are_outermost():
  @dataclasses.dataclass(frozen=True)  # a tuple would be taken for an array
  class Device:
    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "fake"

  devices = [Device(i, i // 2, i // 4) for i in range(8)]
  own = _slices(devices, 0)
  assert [[device.id for device in part] for part in own] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  nodes = [dataclasses.replace(device, slice_index=0) for device in devices]  # GPUs: only processes tell nodes apart
  assert [[device.id for device in part] for part in _slices(nodes, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert _slices(nodes, 0) == [nodes]
  for devices_of, asked in ((devices, 4), (nodes, 3)):
    with pytest.raises(ValueError, match=f"config.mesh.slices is {asked}"):
      _slices(devices_of, asked)
  mesh = make_mesh({"data": 4, "fsdp": 2}, devices)
  assert mesh.shape["data"] == 4 and all(kind == AxisType.Explicit for kind in mesh.axis_types)
  ids = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
  assert ids.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(ValueError, match="config.mesh.data is 1.*multiple of 2"):
    make_mesh({"data": 1, "fsdp": 8}, devices)
