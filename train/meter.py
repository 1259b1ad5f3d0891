"""How fast a run goes: tokens, time, waiting, FLOP/s, memory from one record to the next; a profile of some steps."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from train.chips import peak_of
from train.compiler import held_bytes, return_memory, temporary_bytes

GIB = 2**30


class Meter:
  """Measures from one `read` to the next.

  Args:
    flops: of the model in a step, all devices, see `train/flops.py`.
    devices: of the mesh.
  """

  def __init__(self, flops: int, devices: Sequence[jax.Device]):
    self._flops, self._peak = flops, sum(peak_of(device.device_kind) or 0.0 for device in devices)
    self._local = [device for device in devices if device.process_index == jax.process_index()]
    self.start(0)

  def start(self, step: int) -> None:
    """Begins to measure, with `step` steps done."""
    self._step, self._time, self._own = step, time.perf_counter(), time.thread_time()
    self._tokens, self._waited = 0.0, 0.0

  def wait_for(self, batches: Iterator[Any]) -> Any:
    """Returns the next of `batches`, and counts the time that it takes as waiting."""
    began = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - began
    return batch

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """Leaves out the time that is spent inside; no step may be in flight."""
    own, began = time.thread_time(), time.perf_counter()
    yield
    self._time += time.perf_counter() - began
    self._own += time.thread_time() - own

  def count(self, tokens: float) -> None:
    """Counts real (not padding) tokens."""
    self._tokens += tokens

  def read(self, step: int) -> dict[str, float]:
    """Says how it went since the last time, and begins anew.

    Args:
      step: steps done.

    Returns:
      `tokens_per_second` (real ones); `step_ms`; `host_ms`, this thread's own CPU time a step, which the devices hide
      while it is smaller; `data_wait`, the share of the time in which the loop waited for a batch; `mfu` where the
      devices' peak is known, else `model_gflops_per_second`; and memory, the largest of this process's devices:
      `device_gib`, `device_peak_gib`, where the backend counts it, else `host_peak_gib` of this process.
    """
    own = time.thread_time() - self._own  # before the other clock, so that it is never more
    seconds = max(time.perf_counter() - self._time, 1e-9)
    steps = max(step - self._step, 1)
    speed = {
      "tokens_per_second": round(self._tokens / seconds, 1),
      "step_ms": round(1e3 * seconds / steps, 3),
      "host_ms": round(1e3 * own / steps, 3),
      "data_wait": round(min(self._waited / seconds, 1.0), 4),
    }
    rate = self._flops * (step - self._step) / seconds
    speed |= {"mfu": round(rate / self._peak, 4)} if self._peak else {"model_gflops_per_second": round(rate / 1e9, 3)}
    self.start(step)
    return speed | memory(self._local)


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
  """Returns GiB in use and at the most, see `Meter.read`."""
  stats = [stats for device in devices if (stats := device.memory_stats())]
  if not stats:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there
    return {"host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB, 3)}
  names = {"device_gib": "bytes_in_use", "device_peak_gib": "peak_bytes_in_use"}
  return {name: round(max(found.get(key, 0) for found in stats) / GIB, 3) for name, key in names.items()}


def compiled(step: Any, state: Any, batch: Any, name: str, what: str = "step") -> jax.stages.Compiled:
  """Compiles a step for a state and a batch, and says how long that took and what it needs.

  Args:
    step: from `jax.jit`.
    state, batch: its arguments, or their shapes.
    name: of the stage, for the terminal.
    what: is compiled, for the terminal.
  """
  began = time.monotonic()
  program = step.lower(state, batch).compile()
  return_memory()
  line, stats = f"{name}: {what} compiled in {time.monotonic() - began:.1f} s", program.memory_analysis()
  if stats is not None:  # not every backend counts
    held, temporary = held_bytes(stats), temporary_bytes(stats, jax.default_backend())
    line += f"; a device needs {(held + temporary) / GIB:.3f} GiB ({temporary / GIB:.3f} of them while it runs)"
  print(line, flush=True)
  return program


class Profile:
  """Records a window of steps by `jax.profiler`, for TensorBoard or Perfetto.

  Args:
    folder: where the trace goes.
    first: first step of the window, counted from 1.
    count: steps in it; 0 = no profile.
    done: steps done before this process.
    steps: of the stage.

  Raises:
    ValueError: the window is not within the steps.
  """

  def __init__(self, folder: Path, first: int, count: int, done: int, steps: int):
    if count and not 1 <= first <= first + count - 1 <= steps:
      raise ValueError(
        f"config.train.profile_first_step {first} and .profile_steps {count}: expected a window of steps within "
        f"1 to {steps}, config.train.steps"
      )
    self._folder, self._first, self._last = folder, first, first + count - 1
    self._running = False
    if count and first <= done:
      print(f"profile: step {first} was done before; nothing is recorded", flush=True)

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Dispatches step `number` (from 1) inside, and starts the recording before the window's first."""
    if number == self._first <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int, metrics: Any) -> None:
    """Ends the recording once the window's last step is done; only that step is waited for."""
    if self._running and number == self._last:
      jax.block_until_ready(metrics)
      self.close()
      print(f"profile: steps {self._first} to {self._last} are in {self._folder}", flush=True)

  def close(self) -> None:
    """Ends a recording that is under way."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
