"""Optimizers and schedules by name, from optax; which parameters decay; statistics layer by layer."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from models.sharding import path_name

# Not a matrix: norms, biases, T5's table of relative positions.
NO_DECAY = re.compile(r"(scale|bias)$|relative_bias/")


def constant(peak: float, warmup: int, steps: int, final_fraction: float) -> optax.Schedule:
  """Linear warm-up to `peak`, then constant."""
  del steps, final_fraction
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup])


def cosine(peak: float, warmup: int, steps: int, final_fraction: float) -> optax.Schedule:
  """Linear warm-up to `peak`, then half a cosine down to `final_fraction · peak` at `steps`."""
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak * final_fraction)


def rsqrt(peak: float, warmup: int, steps: int, final_fraction: float) -> optax.Schedule:
  """T5's: constant `peak` for `warmup` steps, then `peak · sqrt(warmup / step)`."""
  del steps, final_fraction
  warmup = max(warmup, 1)
  return lambda step: peak * jax.lax.rsqrt(jax.numpy.maximum(step, warmup) / warmup)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {"constant": constant, "cosine": cosine, "rsqrt": rsqrt}


def decay_mask(params: Any) -> Any:
  """Returns True for each parameter that weight decay applies to: matrices and embeddings, by path."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not NO_DECAY.search(path_name(path)), params)


def adamw(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019), decay on matrices only."""
  return optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask)


def adafactor(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Adafactor as T5 uses it (Shazeer & Stern 2018): factored, update clipped at 1, scaled by the parameter's RMS."""
  # optax's own weight decay here is not scaled by the learning rate: 0.1 would take a tenth of a weight every step.
  return optax.chain(optax.adafactor(schedule), decoupled_decay(config.weight_decay, schedule))


def decoupled_decay(rate: float, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Takes `rate · learning rate` of each matrix away every step, as AdamW does; `rate` 0 does nothing."""
  if not rate:
    return optax.identity()

  def init(params: Any) -> jax.Array:
    del params
    return jax.numpy.int32(0)

  def update(updates: Any, count: jax.Array, params: Any) -> tuple[Any, jax.Array]:
    share = rate * schedule(count)
    decayed = jax.tree.map(lambda u, p, on: u - share * p if on else u, updates, params, decay_mask(params))
    return decayed, count + 1

  return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "adafactor": adafactor}


def build_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  """Builds `config.optimizer`'s schedule over a run of `steps`."""
  if config.schedule not in SCHEDULES:
    raise ValueError(f"config.optimizer.schedule is {config.schedule!r}; known: {sorted(SCHEDULES)}")
  return SCHEDULES[config.schedule](config.learning_rate, config.warmup_steps, steps, config.final_fraction)


def build_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """Builds `config.optimizer` for a run of `steps`: clipping, then the optimizer layer by layer.

  Raises:
    ValueError: an unknown optimizer or schedule.
  """
  if config.name not in OPTIMIZERS:
    raise ValueError(f"config.optimizer.name is {config.name!r}; known: {sorted(OPTIMIZERS)}")
  inner = in_float32(layer_by_layer(OPTIMIZERS[config.name](config, build_schedule(config, steps))))
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), inner) if config.clip_norm else inner


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Keeps statistics and updates in float32 where parameters are stored in less."""

  def cast(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jax.numpy.float32), tree)

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return inner.update(cast(grads), state, cast(params))

  return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `inner` to each stacked layer as if the layers were separate parameters.

  Adafactor's statistics (which dims are factored, the RMS of an update or a parameter) are of a parameter; on a stack
  of layers they would mix layers. Optimizers that work entry by entry are not changed by this.
  """

  def pick(tree: Any, stacked: bool) -> Any:  # the other parameters become None, an empty subtree
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf if ("layers/" in path_name(path)) == stacked else None, tree
    )

  def init(params: Any) -> Any:
    return {"stacked": jax.vmap(inner.init)(pick(params, True)), "single": inner.init(pick(params, False))}

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    stacked, single = ((pick(grads, which), pick(params, which)) for which in (True, False))
    stacked_updates, stacked_state = jax.vmap(inner.update)(stacked[0], state["stacked"], stacked[1])
    single_updates, single_state = inner.update(single[0], state["single"], single[1])
    merged = jax.tree.map(
      lambda a, b: b if a is None else a, stacked_updates, single_updates, is_leaf=lambda x: x is None
    )
    return merged, {"stacked": stacked_state, "single": single_state}

  return optax.GradientTransformation(init, update)
