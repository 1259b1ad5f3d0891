"""What a run says of its speed; a profile of some steps; the loop's own cost."""

import errno
import json
import os
import platform
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from data.cache import programs_folder
from tests.test_train import config_of, domain, one_cpu, run  # noqa: F401
from train import loop, meter
from train.compiler import return_memory
from train.log import Log, read_metrics
from train.meter import Meter, Profile, compiled


def device(kind="cpu", stats=None):
  return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test sets."""
  now = SimpleNamespace(wall=0.0, own=0.0)
  monkeypatch.setattr(
    meter, "time", SimpleNamespace(perf_counter=lambda: now.wall, thread_time=lambda: now.own, monotonic=time.monotonic)
  )
  return now


def test_rates_are_of_the_steps_since_the_last_record(clock):
  counter = Meter(3_000_000_000, [device("TPU v4"), device("TPU v4")])
  clock.wall = 50.0  # compilation
  counter.start(10)
  clock.wall, clock.own = 51.0, 0.1
  counter.count(400.0)

  def slow():
    clock.wall += 1.0
    yield "batch"

  assert counter.wait_for(slow()) == "batch"
  speed = counter.read(14)
  assert speed["tokens_per_second"] == 200.0 and speed["step_ms"] == 500.0 and speed["data_wait"] == 0.5
  assert speed["host_ms"] == 25.0
  assert speed["mfu"] == pytest.approx(4 * 3e9 / 2 / (2 * 275e12), abs=1e-4)
  clock.wall += 1.0
  again = counter.read(15)
  assert again["tokens_per_second"] == again["data_wait"] == 0.0 and again["step_ms"] == 1000.0


def test_an_unknown_device_gets_flops_and_no_utilisation(clock):
  counter = Meter(4_000_000_000, [device("cpu")])
  clock.wall = 2.0
  speed = counter.read(1)
  assert speed["model_gflops_per_second"] == 2.0 and "mfu" not in speed and speed["host_peak_gib"] > 0


def test_memory_is_that_of_the_fullest_device():
  stats = [{"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}, {"bytes_in_use": 2**31, "peak_bytes_in_use": 2**31}]
  assert meter.memory([device("TPU v4", found) for found in stats]) == {"device_gib": 2.0, "device_peak_gib": 3.0}


@pytest.mark.parametrize(("first", "count"), [(0, 2), (9, 3), (11, 1)])
def test_a_profile_outside_the_steps_is_refused(tmp_path, first, count):
  with pytest.raises(ValueError, match="profile_first_step .* within 1 to 10"):
    Profile(tmp_path, first, count, 0, 10)


def test_a_run_records_speed_and_the_profile_that_is_asked_for(domain, tmp_path, one_cpu, capsys):  # noqa: F811
  asked = {"train.steps": 6, "train.profile_first_step": 3, "train.profile_steps": 2, "train.log_every_steps": 2}
  run(config_of(domain, **asked), tmp_path)
  out = capsys.readouterr().out
  assert "test: step compiled in" in out and "GiB" in out and "profile: steps 3 to 4 are in" in out
  assert [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size]
  records = read_metrics(tmp_path)
  assert [record["step"] for record in records] == [2, 4, 6]
  for record in records:
    assert record["step_ms"] >= record["host_ms"] > 0 and 0 <= record["data_wait"] <= 1
    assert record["model_gflops_per_second"] > 0 and record["host_peak_gib"] > 0.1 and record["tokens_per_second"] > 0
  # A window that lies before the step that a run goes on from says so, and does not change the run.
  with pytest.raises(ValueError, match="batch_size"):
    run(config_of(domain, **asked, **{"data.batch_size": 2}), tmp_path)
  again = run(config_of(domain, **{"train.steps": 6, "train.log_every_steps": 2}), tmp_path)
  assert again.record["steps"] == 6


def test_metrics_of_unrecorded_steps_stay_on_the_device(domain, tmp_path, one_cpu, monkeypatch):  # noqa: F811
  fetched, get = [], jax.device_get
  monkeypatch.setattr(loop.jax, "device_get", lambda tree: fetched.append(set(tree)) or get(tree))
  run(config_of(domain, **{"train.steps": 4, "train.log_every_steps": 4, "train.checkpoint_every_steps": 4}), tmp_path)
  steps = [keys for keys in fetched if "tokens" in keys]
  watched = {"tokens", "loss", "gradient_norm", "skipped"}  # what decides whether the run is sound
  assert steps[:3] == [watched] * 3 and "task_loss" in steps[3]


def test_a_step_is_compiled_once_and_only_for_its_shapes(capsys):
  step = jax.jit(lambda state, batch: (state + batch, state))
  program = compiled(step, jax.numpy.zeros(4), jax.numpy.ones(4), "here")
  assert "here: step compiled in" in capsys.readouterr().out
  assert program(jax.numpy.zeros(4), jax.numpy.ones(4))[0].tolist() == [1.0] * 4
  with pytest.raises(TypeError, match="compiled"):
    program(jax.numpy.zeros(5), jax.numpy.ones(5))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_what_the_compiler_has_freed_goes_back_to_the_system():
  def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

  pieces = [bytes(20_000) for _ in range(10_000)]  # too large for Python's own pools, too small for pages of their own
  last = pieces.pop()  # holds what lies before it
  del pieces
  before = resident()
  return_memory()
  assert last and resident() < before - 100e6


def test_the_log_keeps_one_file_of_events_and_says_when_input_is_slow(tmp_path, capsys):
  log = Log(tmp_path, "name", 0, 100)
  speed = {"tokens_per_second": 1234.5, "step_ms": 1500.0, "host_ms": 0.1, "data_wait": 0.25, "mfu": 0.4}
  log.write(20, {"loss": 2.0, "task_loss": {"a": 1.0, "b": 3.0}, "batch": "ff"}, speed)
  log.close()
  line = "name  step 20/100  loss 2.000  1,234 tokens/s  1,500.0 ms  mfu 0.400  input 25 %  2:00 left"
  assert capsys.readouterr().out.strip() == line
  assert len([path for path in tmp_path.rglob("events.*")]) == 1
  assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
    **{"step": 20, "loss": 2.0, "task_loss": {"a": 1.0, "b": 3.0}, "batch": "ff"},
    **speed,
  }


def test_events_are_written_by_the_caller_so_that_a_full_disk_is_its_error(tmp_path, monkeypatch):
  threads = threading.active_count()
  log = Log(tmp_path, "name", 4, 100)
  speed = {"tokens_per_second": 1.0, "step_ms": 1.0, "data_wait": 0.0}
  log.write(5, {"loss": 2.0, "task_loss": {"a": 1.0}}, speed)
  log.validation(5, {"a": {"value": 0.5}}, None)
  assert threading.active_count() == threads
  (file,) = tmp_path.glob("events.*")
  content = file.read_bytes()
  assert all(name in content for name in (b"loss", b"task_loss/a", b"tokens_per_second", b"validation/a"))

  def full(event):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(log._events, "write_event", full)
  with pytest.raises(OSError, match="No space left"):
    log.write(6, {"loss": 2.0}, speed)


def test_compiled_programs_have_a_folder_for_each_kind_of_machine(monkeypatch, tmp_path):
  here = programs_folder(str(tmp_path))
  assert here == programs_folder(str(tmp_path)) and here.parent == tmp_path / "compiled"
  monkeypatch.setattr("data.cache.platform.processor", lambda: "another")
  assert programs_folder(str(tmp_path)) != here
