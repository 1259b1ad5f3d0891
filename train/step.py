"""The training step: one pure function `(state, batch) -> (state, metrics)`.

`make_step` is for any mesh (`jax.jit`; layouts are in the arrays' types). `make_shard_map_step` is the same step
written per device with an explicit `psum`, for data parallelism; a test holds the two equal. Losses are sums until the
one division by the global weight, so accumulation, packing and sharding do not change the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from models import Model
from models.model import Batch
from models.module import Params
from models.sharding import AXES, BATCH, platform, spec, split_over
from train.loss import token_losses
from train.moments import on_device

State = dict[str, Any]  # params, opt, step; frozen, where only a part of the model is trained; norms, see `new_norms`
Metrics = dict[str, jax.Array]

WINDOW = 128  # steps whose gradient norms say what is usual
LEAST = 16  # of them, before any norm is called a spike


def all_trained(trained: Params, frozen: Params) -> Params:
  """Returns the parameters of a model that is trained as a whole."""
  del frozen
  return trained


def make_gradients(
  model: Model, *, tasks: int, losses: dict[str, float], accumulation_steps: int, join: Callable
) -> Callable:
  """Returns `(trained, frozen, batch, key) -> (gradient sums, metric sums)` over one batch, in microbatches.

  Args:
    model: the model.
    tasks: number of task ids; metrics hold a sum for each.
    losses: `z_loss`, `label_smoothing` and `chunk_tokens` of `token_losses`.
    accumulation_steps: microbatches; must divide the batch's rows (on each device).
    join: `(trained, frozen) -> params` of the model; there are gradients of `trained` only.
  """

  def loss(trained, frozen, batch: Batch, key):
    params = join(trained, frozen)
    features = model.features(params, batch, key)
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    total, tokens = token_losses(
      features,
      model.head(params),
      targets,
      weights,
      vocab_size=model.config.vocab_size,
      logit_cap=model.logit_cap,
      **losses,
    )
    task_BTN = (batch["task_ids"][:, :, None] == jnp.arange(tasks)) * weights[:, :, None]
    sums = {name: jnp.sum(weights * value) for name, value in tokens.items()}
    sums |= {"weight": jnp.sum(weights), "task_weight": jnp.sum(task_BTN, (0, 1))}
    sums |= {"task_nll": jnp.sum(task_BTN * tokens["nll"][:, :, None], (0, 1))}
    sums["tokens"] = sum(jnp.sum(batch[k] > 0, dtype=jnp.float32) for k in batch if k.endswith("segment_ids"))
    return total, sums

  gradient = jax.grad(loss, has_aux=True)

  def split(x):  # [B,T] -> [microbatches, rows, T]; every device keeps its own rows
    shape = (x.shape[0] // accumulation_steps, accumulation_steps) + x.shape[1:]
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=spec(BATCH, None, split_over(x))), 1, 0)

  def gradients(trained, frozen, batch: Batch, key):
    if accumulation_steps == 1:
      return gradient(trained, frozen, batch, key)

    def body(sums, xs):
      number, microbatch = xs
      new = gradient(trained, frozen, microbatch, None if key is None else jax.random.fold_in(key, number))
      return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new), None

    xs = (jnp.arange(accumulation_steps), jax.tree.map(split, batch))
    like = gradient(trained, frozen, jax.tree.map(lambda x: x[0], xs[1]), key)
    # Not in a parameter's own bfloat16, which loses what is small beside the sum.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), like)
    return jax.lax.scan(body, zeros, xs)[0]

  return gradients


def _at_state(
  gradients: Callable, model: Model, seed: int, point: Callable, own: Callable = lambda key: key
) -> Callable[[State, Batch], tuple]:
  """Returns `(state, batch) -> sums` of `make_gradients`, at the parameters and with the dropout of a state's step."""

  def at_state(state: State, batch: Batch) -> tuple:
    key = own(jax.random.fold_in(jax.random.key(seed), state["step"])) if model.config.dropout > 0.0 else None
    return gradients(point(state["params"], state["opt"]), state.get("frozen", {}), batch, key)

  return at_state


def make_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  tasks: int,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk_tokens: int = 512,
  accumulation_steps: int = 1,
  join: Callable[[Params, Params], Params] = all_trained,
  point: Callable[[Params, Any], Params] = lambda params, opt: params,
  spike_factor: float = 0.0,
  reduce: Callable = lambda sums: sums,
  own: Callable[[jax.Array], jax.Array] = lambda key: key,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """Builds the step for any mesh.

  Args:
    model: the model.
    optimizer: an optax transformation over the mean gradient.
    seed: dropout at step s draws from `fold_in(key(seed), s)`; nothing random is stored.
    tasks: number of task ids in `batch["task_ids"]`.
    z_loss: weight of log(Z)².
    label_smoothing: see `token_losses`; the metrics are of the plain loss.
    chunk_tokens: tokens whose logits exist at one time on a device.
    accumulation_steps: microbatches in a step.
    join: `(state["params"], state["frozen"]) -> params` of the model; what is frozen has no gradient, no optimizer
      state, and goes through the step as it is.
    point: `(state["params"], state["opt"]) -> parameters` at which the gradient is taken.
    spike_factor: a gradient norm above this many times the usual one is skipped, see `usual`; 0 = none is.
    reduce: adds up sums over devices where the step is per-device.
    own: makes a device's own key of the step's, where the step is per-device.

  Returns:
    The step. Metrics: means over supervised tokens `loss` (nll), `z_loss`, `accuracy`; `weight`, `tokens` (real
    ones, both sides), `gradient_norm`; `skipped`, 1 where the loss or the gradient's norm is not finite or a spike:
    then parameters and optimizer state stay as they were, bit for bit; per task [tasks] `task_loss`, `task_weight`.
  """
  losses = {"z_loss": z_loss, "label_smoothing": label_smoothing, "chunk_tokens": chunk_tokens}
  gradients = make_gradients(model, tasks=tasks, losses=losses, accumulation_steps=accumulation_steps, join=join)
  gradients = _at_state(gradients, model, seed, point, own)

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    grads, sums = reduce(gradients(state, batch))
    weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(sums["nll"])
    after = {}
    if spike_factor:
      good &= ~(norm > spike_factor * usual(state["norms"]))
      after["norms"] = jnp.where(good, jnp.append(state["norms"][1:], norm), state["norms"])
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    after |= {"params": optax.apply_updates(state["params"], updates), "opt": opt}
    # A choice for each entry rather than a branch: it joins the update's own loop, and the state stays donated.
    after["params"] = chosen(good, after["params"], state["params"])
    after["opt"] = chosen(once_made(good, after["params"]), after["opt"], state["opt"])
    metrics = {**means_of(sums, weight), "gradient_norm": norm, "skipped": 1.0 - good}
    return {**state, **after, "step": state["step"] + 1}, metrics

  return step


def means_of(sums: dict[str, jax.Array], weight: jax.Array) -> Metrics:
  """Returns the metrics of a step that are made from its sums, see `make_step`; `weight` is theirs, or 1 for none."""
  return {
    "loss": sums["nll"] / weight,
    "z_loss": sums["z_loss"] / weight,
    "accuracy": sums["correct"] / weight,
    "weight": sums["weight"],
    "tokens": sums["tokens"],
    "task_loss": sums["task_nll"] / jnp.maximum(sums["task_weight"], 1e-9),
    "task_weight": sums["task_weight"],
  }


def make_task_gradients(
  model: Model,
  *,
  seed: int,
  tasks: int,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk_tokens: int = 512,
  accumulation_steps: int = 1,
  join: Callable[[Params, Params], Params] = all_trained,
  point: Callable[[Params, Any], Params] = lambda params, opt: params,
) -> Callable[[State, Batch], Metrics]:
  """Builds what tells how much of a step's gradient each task is, for any mesh; it changes nothing.

  A task's gradient is that of the step's loss with all other tasks' weights 0, by the same total weight, at the same
  parameters, with the same dropout: the tasks' gradients add up to the step's, before clipping. One after the other is
  taken, so that no more than two gradients exist at a time; a task that the batch lacks costs nothing.

  Args:
    model, seed, tasks, z_loss, label_smoothing, chunk_tokens, accumulation_steps, join, point: as for `make_step`.

  Returns:
    `(state, batch) -> metrics`, float32 [tasks] each: `task_gradient_norm`; `task_gradient_share`, the norm by the sum
    of the norms; `task_gradient_cosine` with the step's gradient. So the sum of norm · cosine is the step's norm.
  """
  losses = {"z_loss": z_loss, "label_smoothing": label_smoothing, "chunk_tokens": chunk_tokens}
  gradients = make_gradients(model, tasks=tasks, losses=losses, accumulation_steps=accumulation_steps, join=join)
  gradients = _at_state(gradients, model, seed, point)

  def task_gradients(state: State, batch: Batch) -> Metrics:
    whole, sums = gradients(state, batch)

    def one(task: jax.Array) -> tuple[jax.Array, jax.Array]:
      weights = jnp.where(batch["task_ids"] == task, batch["decoder_loss_weights"], 0.0)
      part, _ = gradients(state, {**batch, "decoder_loss_weights": weights})
      return optax.tree.norm(part), _dot(part, whole)

    def if_there(task: jax.Array) -> tuple[jax.Array, jax.Array]:
      return jax.lax.cond(sums["task_weight"][task] > 0, one, lambda _: (jnp.float32(0), jnp.float32(0)), task)

    norms, dots = jax.lax.map(if_there, jnp.arange(tasks))
    return {
      "task_gradient_norm": norms / jnp.where(sums["weight"] > 0, sums["weight"], 1.0),
      "task_gradient_share": norms / jnp.maximum(jnp.sum(norms), 1e-30),
      "task_gradient_cosine": dots / jnp.maximum(norms * optax.tree.norm(whole), 1e-30),
    }

  return task_gradients


def _dot(first: Params, second: Params) -> jax.Array:
  products = jax.tree.map(lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), first, second)
  return sum(jax.tree.leaves(products))


def chosen(good: jax.Array, after: Any, before: Any) -> Any:
  """Returns `after` where `good` (bool []) holds, else `before`, bit for bit; what the host keeps stays there."""

  def choose(new: jax.Array, old: jax.Array) -> jax.Array:
    away = jax.typeof(new).memory_space
    result = jnp.where(good, on_device(new), on_device(old))
    return result if away == jax.memory.Space.Device else jax.device_put(result, away)

  return jax.tree.map(choose, after, before)


def once_made(good: jax.Array, params: Params) -> jax.Array:
  """Returns `good`; on a single CPU device, not before the parameters are there.

  Their update reads Adam's moments as they were. Where XLA for CPUs is free to write the new moments over them first,
  it copies them before, all at one time: 74 MiB of the 2,250 that a small T5's step takes.
  """
  if platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
    return good
  firsts = [leaf.at[(0,) * leaf.ndim].get(out_sharding=spec()) for leaf in jax.tree.leaves(params)]
  return good & ~(jnp.stack(firsts).min() < -jnp.inf)  # never below it, NaN neither; XLA does not know that


def new_norms() -> np.ndarray:
  """Returns the norms of a run that has none yet, float32 [WINDOW]: 0 stands for none."""
  return np.zeros(WINDOW, np.float32)


def usual(norms_W: jax.Array) -> jax.Array:
  """Returns the median of the gradient norms of the last good steps, and infinity while they are few.

  Args:
    norms_W: float32 [WINDOW], see `new_norms`.
  """
  there_W = norms_W > 0
  median = jnp.nanmedian(jnp.where(there_W, norms_W, jnp.nan))
  return jnp.where(jnp.sum(there_W) < LEAST, jnp.inf, median)


def make_shard_map_step(model: Model, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, **settings):
  """Builds the same step per device: parameters replicated, rows split, one explicit `psum` of gradients and sums.

  Dropout alone is not that of the other step: each device draws its rows' own.

  Args:
    model: the model.
    optimizer: as for `make_step`.
    mesh: only its `data` axis may be larger than 1.
    **settings: as for `make_step`.

  Raises:
    ValueError: another axis is larger than 1.
  """
  if mesh.size > mesh.shape["data"]:
    raise ValueError(f"the shard_map step is data-parallel only, got mesh {dict(mesh.shape)}; set train.step='jit'")
  own = lambda key: jax.random.fold_in(key, jax.lax.axis_index("data"))
  local = make_step(model, optimizer, reduce=lambda sums: jax.lax.psum(sums, AXES), own=own, **settings)

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    # The state's layouts name axes of size 1 here: each device holds the whole of it.
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state, batch))
    # With check_vma the gradient of replicated parameters would be summed already, and the psum would sum it again.
    run = jax.shard_map(local, in_specs=layouts, out_specs=(layouts[0], P()), check_vma=False)
    return run(state, batch)

  return step
