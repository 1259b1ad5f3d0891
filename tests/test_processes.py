"""The same global batches on 1, 2 and 4 real processes (jax.distributed on loopback), straight through and resumed."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_pipeline import write

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
from train.evaluate import on_mesh

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
