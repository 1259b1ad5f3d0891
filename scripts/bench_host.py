"""Measures what the training loop's Python takes a step, beside what the device takes.

  python -m scripts.bench_host [--steps=1000] [--stream=ready]

Runs `train.loop.run_steps` itself with a tiny GPT on the embedded domain. `--stream=ready` gives it the same batch
again and again, so that only the loop is measured; `--stream=real` makes batches as a run does. The yardstick is the
same compiled step called back to back on ready inputs, with as many steps in flight. Two figures, medians over records:
wall time a step beyond the yardstick's, and the loop's thread's own CPU time beyond it.
"""

import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any


class Ready:
  """A stream that always gives its first batch.

  Args:
    stream: from `build_stream`.
  """

  def __init__(self, stream: Any):
    self.task_names, self.shares, self.summary = stream.task_names, stream.shares, stream.summary
    self.fingerprint = stream.fingerprint
    self._batch, self._state = next(stream), stream.state()

  def __next__(self) -> dict[str, Any]:
    return self._batch

  def state(self) -> dict[str, Any]:
    """Returns where the stream stood after that batch."""
    return self._state


def config_of(steps: int) -> Any:
  """Returns the config of a GPT of two layers, 32 wide, on rows of 64 bytes."""
  from configs import pretrain

  config = pretrain.get_config("gpt-tiny")
  with config.unlocked():
    config.update_from_flattened_dict(
      {"general": "", "tokenizer.path": "bytes", "optimizer.name": "adamw", "cpu_devices": 0}
      | {"data.batch_size": 2, "data.decoder_length": 64, "train.steps": steps}
      | {"train.checkpoint_every_steps": steps}
    )
    config.data.mixture = {"domain": 1.0}
    sizes = {"layers": 2, "embed_dim": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    config.model.overrides.update(sizes)
  return config.lock()


def bare(step: Any, state: Any, batch: Any, steps: int, in_flight: int) -> tuple[Any, float, float]:
  """Calls a compiled step back to back; returns the state, and wall and own CPU time of a step in ms."""
  import jax

  pending, began, own = deque(), time.perf_counter(), time.thread_time()
  for _ in range(steps):
    state, metrics = step(state, batch)
    pending.append(metrics)
    if len(pending) > in_flight:
      jax.block_until_ready(pending.popleft())
  jax.block_until_ready(state)
  return state, 1e3 * (time.perf_counter() - began) / steps, 1e3 * (time.thread_time() - own) / steps


def main(steps: int, kind: str, workdir: Path) -> None:
  """Prints the yardstick, the loop, and the difference."""
  import jax

  from data.pipeline import build_stream
  from models.sharding import make_mesh, on_mesh
  from train import loop, programs
  from train.checkpoint import Checkpoints
  from train.guard import Watchdog
  from train.log import read_metrics
  from train.meter import compiled
  from train.recipe import load_materials
  from train.stage import scratch_params
  from train.validation import Validation

  config = config_of(steps)
  materials, mesh = load_materials(config, workdir), make_mesh(config.mesh)
  model = loop.build_model(config, materials.tokenizer)
  stream = build_stream(config, materials.tokenizer, materials.domain, None, {})
  with jax.set_mesh(mesh), Checkpoints(workdir, writes=True) as checkpoints:
    state, batch = loop.new_state(config, scratch_params(config, model, mesh), mesh), on_mesh(next(stream))
    step, found = compiled(programs.make_train_step(config, model, mesh, 1), state, batch, "bare"), []
    for _ in range(5):
      state, *times = bare(step, state, batch, steps // 5, loop.IN_FLIGHT)
      found.append(times)
    stream = Ready(stream) if kind == "ready" else stream
    record = {"steps": 0, "tokens": 0, "seconds": 0.0}
    unmeasured = Validation(config, {}, model, materials.tokenizer)
    loop.run_steps(config, workdir, "loop", model, mesh, checkpoints, stream, state, record, Watchdog(0), unmeasured)
  records = read_metrics(workdir)[1:]
  wall, own = (statistics.median(times) for times in zip(*found, strict=True))
  loop_wall, loop_own = (statistics.median(record[key] for record in records) for key in ("step_ms", "host_ms"))
  print(f"step alone      {wall:.3f} ms a step, own CPU time {own:.3f} ms")
  print(f"loop, {kind:5s}     {loop_wall:.3f} ms a step, own CPU time {loop_own:.3f} ms")
  print(f"the loop adds   {loop_wall - wall:.3f} ms a step, own CPU time {loop_own - own:.3f} ms")


if __name__ == "__main__":
  from scripts import flags

  values = flags.new()
  flags.integer(values, "steps", 1000, "steps")
  flags.string(values, "stream", "ready", "ready: one batch again and again; real: batches made as in a run")
  values = flags.parse(values, "bench_host", __doc__, sys.argv[1:], [])
  if values.stream not in ("ready", "real"):
    sys.exit(f"bench_host: --stream must be ready or real, got {values.stream!r}")
  with tempfile.TemporaryDirectory(prefix="argot-host-") as temporary:
    main(values.steps, values.stream, Path(temporary))
