"""The programs that a run compiles: the step as a config asks for it, what tells of its tasks' gradients, batches."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from data.features import CONVERTERS
from data.pipeline import layout_of
from data.tokenizer import Tokenizer
from models import Model, low_precision
from models.sharding import batch_parts, token_spec
from train.compiler import compiler_options
from train.meter import compiled
from train.optimizer import build_optimizer, gradient_point
from train.step import State, make_shard_map_step, make_step, make_task_gradients
from train.tuning import build_tuning


def build_join(config: ConfigDict) -> Callable:
  """Returns `(trained, frozen) -> params` that the step computes with: in `config.model.matmul`'s precision.

  Raises:
    ValueError: an unknown precision, its library is missing, or it would not reach adapted weights.
  """
  kind, join = config.model.matmul, build_tuning(config).join
  low_precision.check(kind)
  if kind == "default":
    return join
  if config.lora.rank:
    raise ValueError(f"config.model.matmul is {kind!r}: with adapters (config.lora.rank) it must be 'default'")
  return lambda trained, frozen: low_precision.quantised(join(trained, frozen), kind)


def gradient_settings(config: ConfigDict, tasks: int) -> dict[str, Any]:
  """Returns what shapes a step's gradient, as `make_step` and `make_task_gradients` take it."""
  return {
    "seed": config.seed,
    "tasks": tasks,
    "z_loss": config.train.z_loss,
    "label_smoothing": label_smoothing(config),
    "chunk_tokens": config.train.loss_chunk_tokens,
    "accumulation_steps": config.train.accumulation_steps,
    "join": build_join(config),
    "point": gradient_point(config.optimizer),
  }


def compile_steps(config: ConfigDict, model: Model, mesh: Mesh, tasks: int, state: State, batch: Any, name: str):
  """Compiles the step, and what tells of its tasks' gradients where that is asked for.

  Args:
    config, model, mesh, tasks: see `make_train_step`.
    state, batch: what the programs are for.
    name: of the stage, for the terminal.

  Returns:
    `(number, state, batch) -> (state, metrics)`, for the step of that number.

  Raises:
    ValueError: `config.train.task_gradients_every_steps` is negative.
  """
  step, every = compiled(make_train_step(config, model, mesh, tasks), state, batch, name), task_gradients_every(config)
  if not every:
    return lambda number, state, batch: step(state, batch)
  task_gradients = make_task_gradients(model, **gradient_settings(config, tasks))
  task_gradients = jax.jit(task_gradients, compiler_options=compiler_options(mesh))
  task_gradients = compiled(task_gradients, state, batch, name, "task gradients")

  def both(number: int, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
    # Waited for: the step writes over the state, and no more programs shall be in flight than steps.
    found = jax.block_until_ready(task_gradients(state, batch)) if number % every == 0 else {}
    state, metrics = step(state, batch)
    return state, {**metrics, **found}

  return both


def task_gradients_every(config: ConfigDict) -> int:
  """Returns `config.train.task_gradients_every_steps`.

  Raises:
    ValueError: it is negative.
  """
  every = config.train.task_gradients_every_steps
  if every < 0:
    raise ValueError(f"config.train.task_gradients_every_steps is {every}; expected a number of steps, or 0 for never")
  return every


def make_train_step(config: ConfigDict, model: Model, mesh: Mesh, tasks: int):
  """Compiles the step that `config.train.step` names, with the state donated.

  Args:
    config: the stage's.
    model: the model.
    mesh: the mesh.
    tasks: number of task ids.

  Returns:
    The jitted `(state, batch) -> (state, metrics)`, see `make_step`.

  Raises:
    ValueError: an unknown step, or a setting of the gradient or the optimizer that cannot be.
  """
  optimizer = build_optimizer(config.optimizer, config.train.steps)
  settings = {**gradient_settings(config, tasks), "spike_factor": config.train.spike_factor}
  if config.train.step not in ("jit", "shard_map"):
    raise ValueError(f"config.train.step is {config.train.step!r}; known: ['jit', 'shard_map']")
  if config.train.step == "shard_map":
    step = make_shard_map_step(model, optimizer, mesh, **settings)
  else:
    step = make_step(model, optimizer, **settings)
  return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))


def label_smoothing(config: ConfigDict) -> float:
  """Returns `config.train.label_smoothing`.

  Raises:
    ValueError: it is no share below 1.
  """
  share = config.train.label_smoothing
  if not 0.0 <= share < 1.0:
    raise ValueError(f"config.train.label_smoothing must be 0 (none) or a share below 1, such as 0.1; got {share}")
  return share


def batch_like(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes, types and layout of the config's batches.

  Raises:
    ValueError: the rows do not divide over the mesh and the microbatches.
  """
  check_rows(config, mesh)
  one = CONVERTERS[config.architecture]([[]], layout_of(config, tokenizer))

  def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, token_spec(mesh, shape)))

  return {key: like((config.data.batch_size, *x.shape[1:]), x.dtype) for key, x in one.items()}


def check_rows(config: ConfigDict, mesh: Mesh) -> None:
  """Raises a ValueError where the rows of a batch do not divide over the mesh and the microbatches."""
  rows, steps = config.data.batch_size, config.train.accumulation_steps
  groups = batch_parts(mesh)
  if rows % (groups * steps):
    raise ValueError(
      f"config.data.batch_size is {rows}: expected a multiple of {groups * steps}, the mesh's data "
      f"{mesh.shape['data']} × fsdp {mesh.shape['fsdp']} × config.train.accumulation_steps {steps}; "
      f"such as --config.data.batch_size={max(-(-rows // (groups * steps)), 1) * groups * steps}"
    )
