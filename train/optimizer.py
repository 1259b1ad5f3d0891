"""Optimizers by name, from optax; which parameters decay; statistics layer by layer."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from models.lora import contracted_dims
from models.sharding import in_auto, path_name
from train import schedules
from train.moments import in_fewer_bits, offloaded, on_device
from train.schedules import Course

# Not a matrix: norms, biases, T5's table of relative positions.
NO_DECAY = re.compile(r"(scale|bias)$|relative_bias/")
MUON_RMS = 0.2  # of an entry of Muon's update, as of AdamW's


def decay_mask(params: Any) -> Any:
  """Returns True for each parameter that weight decay applies to: matrices and embeddings, by path."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not NO_DECAY.search(path_name(path)), params)


def adamw(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019), decay on matrices only."""
  settings = {"weight_decay": config.weight_decay, "mask": decay_mask}
  return layer_by_layer(optax.adamw(schedule, config.b1, config.b2, config.eps, **settings))


def adamw_rms(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW whose update is scaled by the parameter's root mean square, as Adafactor's is (Shazeer & Stern 2018, §8).

  The learning rate is then a share of the parameter, and T5's rates serve; decay is AdamW's. A parameter's root mean
  square counts as 1e-3 at least.
  """
  scaled = [optax.scale_by_adam(config.b1, config.b2, config.eps), optax.scale_by_param_block_rms(1e-3)]
  decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
  return layer_by_layer(optax.chain(*scaled, decay, optax.scale_by_learning_rate(schedule)))


def adafactor(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Adafactor as T5 uses it (Shazeer & Stern 2018): factored, update clipped at 1, scaled by the parameter's RMS."""
  # optax's own weight decay here is not scaled by the learning rate: 0.1 would take a tenth of a weight every step.
  inner = optax.chain(optax.adafactor(schedule), decoupled_decay(config.weight_decay, schedule))
  return left_to_the_compiler(layer_by_layer(as_matrices(inner)))


def as_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Gives `inner` each matrix of a layer as what `dense` contracts by what it puts out: query DKGH as D by K·G·H.

  Adafactor factors by the two largest dims, if both are 128 or more. A head of 64 is not, and T5's query would have a
  second moment as large as itself.
  """

  def shape_of(path: Any, leaf: jax.Array) -> tuple[int, ...]:
    count = contracted_dims(path_name(path))
    return leaf.shape if count is None else (math.prod(leaf.shape[:count]), math.prod(leaf.shape[count:]))

  def flat(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.reshape(shape_of(path, leaf)), tree)

  def init(params: Any) -> Any:  # of shapes alone: a layout's dims cannot always be merged
    return inner.init(
      jax.tree_util.tree_map_with_path(lambda path, x: jax.numpy.zeros(shape_of(path, x), x.dtype), params)
    )

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = inner.update(flat(grads), state, flat(params))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), updates, grads), state

  return optax.GradientTransformation(init, update)


def lion(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Lion (Chen et al. 2023): the sign of momentum and gradient; wants a third to a tenth of AdamW's rate."""
  return optax.lion(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decay_mask)


def muon(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) on the matrices of layers, NAdamW on all else: embeddings, heads, norms, biases.

  A matrix is what `dense` contracts by what it puts out, layer by layer: query DKGH is D by K·G·H. Updates are scaled
  to AdamW's usual size, 0.2 · sqrt(max(fan in, fan out)), so that one learning rate and one decay serve both
  (Liu et al. 2025, §2.2); `b1` is the momentum, Nesterov's, of either: optax's Muon hands it on to its AdamW.
  """
  settings = {"beta": config.b1, "adam_b1": config.b1, "adam_b2": config.b2, "eps": config.eps}
  inner = optax.contrib.muon(
    schedule, **settings, muon_weight_dimension_numbers=matrix_dims, consistent_rms=MUON_RMS, weight_decay=0.0
  )
  return optax.chain(left_to_the_compiler(inner), decoupled_decay(config.weight_decay, schedule))


def matrix_dims(params: Any) -> Any:
  """Returns, for each matrix of a layer, its contracted and its other dims (L is neither), and None for all else.

  Raises:
    ValueError: there is no matrix.
  """

  def dims(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    name = path_name(path)
    count, first = contracted_dims(name), int("layers/" in name)
    if count is None:
      return None
    split = first + count
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, leaf.ndim)))

  found = jax.tree_util.tree_map_with_path(dims, params)
  if not jax.tree.leaves(found):
    raise ValueError("config.optimizer.name is 'muon', but no matrix of a layer is trained; take 'adamw'")
  return found


def left_to_the_compiler(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Leaves the layouts inside an optimizer to the compiler: matrix products over split dims have more than one."""

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (grads, state))
    return in_auto(inner.update, layouts)(grads, state, params)

  return optax.GradientTransformation(inner.init, update)


def schedule_free(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Schedule-free AdamW (Defazio et al. 2024): an average of the iterates takes the place of the rate's decay.

  The parameters that it is given and updates are the average x, which is what is evaluated, stored and handed on; the
  gradient has to be taken at `gradient_point`, y = (1 - b1) · z + b1 · x. (optax's own form holds y instead.)

  Raises:
    ValueError: the schedule is not "constant", or `b1` is 0.
  """
  if config.schedule != "constant" or not config.b1:
    raise ValueError(
      f"config.optimizer.name 'schedule_free' takes the schedule 'constant' (with its warm-up) and a positive b1, got "
      f"{config.schedule!r} and {config.b1}"
    )
  second = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
  decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
  base = optax.chain(second, decay, optax.scale_by_learning_rate(schedule))
  inner = optax.contrib.schedule_free(base, schedule, config.b1)

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    point = mixed(config.b1, params, state.z)
    updates, state = inner.update(grads, state, point)
    after = optax.contrib.schedule_free_eval_params(state, optax.apply_updates(point, updates))
    return jax.tree.map(jax.numpy.subtract, after, params), state

  return optax.GradientTransformation(inner.init, update)


def mixed(share: float, average: Any, iterate: Any) -> Any:
  """Returns `(1 - share) · iterate + share · average`, in the average's dtype."""
  return jax.tree.map(lambda x, z: ((1 - share) * z + share * x).astype(x.dtype), average, iterate)


def gradient_point(config: ConfigDict) -> Callable[[Any, Any], Any]:
  """Returns `(params, opt) -> parameters at which the gradient is taken`: the same ones, schedule-free apart."""
  if config.name != "schedule_free":
    return lambda params, opt: params
  return lambda params, opt: mixed(config.b1, params, on_device(optax.tree.get(opt, "z")))


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


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": adamw,
  "adamw_rms": adamw_rms,
  "adafactor": adafactor,
  "lion": lion,
  "muon": muon,
  "schedule_free": schedule_free,
}


def build_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  """Builds `config.optimizer`'s schedule over a run of `steps`."""
  fractions = {key: config[key] for key in ("final_fraction", "initial_fraction", "decay_steps")}
  return schedules.build(config.schedule, Course(config.learning_rate, config.warmup_steps, steps, **fractions))


def build_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """Builds `config.optimizer` for a run of `steps`: clipping, then the optimizer.

  Raises:
    ValueError: an unknown optimizer or schedule, or settings that do not go together.
  """
  if config.name not in OPTIMIZERS:
    raise ValueError(f"config.optimizer.name is {config.name!r}; known: {sorted(OPTIMIZERS)}")
  for key in ("learning_rate", "clip_norm", "weight_decay", "warmup_steps", "initial_fraction", "final_fraction"):
    if config[key] < 0:
      raise ValueError(f"config.optimizer.{key} is {config[key]}; expected 0 (none) or more")
  for key in ("b1", "b2"):
    if not 0 <= config[key] < 1:
      raise ValueError(f"config.optimizer.{key} is {config[key]}; expected a share of 0 to below 1, such as 0.9")
  if config.eps <= 0:  # what has no gradient yet, such as a token that was not seen, would be divided by 0
    raise ValueError(f"config.optimizer.eps is {config.eps}; expected more than 0, such as 1e-8")
  schedule = build_schedule(config, steps) if steps else optax.constant_schedule(0.0)  # no steps fit no schedule
  inner = OPTIMIZERS[config.name](config, schedule)
  inner = in_float32(inner if config.moments_dtype == "float32" else in_fewer_bits(inner, config.moments_dtype))
  whole = optax.chain(optax.clip_by_global_norm(config.clip_norm), inner) if config.clip_norm else inner
  return offloaded(whole, config.offload) if config.offload else whole


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

  Its state is `{"stacked": of the layers, "single": of all else}`; of stacks of unlike depth, such as ByT5's encoder
  and decoder, those of each depth are `"stacked_12"`, `"stacked_4"`.
  """

  def depth_of(path: Any, leaf: Any) -> int | None:
    return leaf.shape[0] if "layers/" in path_name(path) else None

  def groups(params: Any) -> dict[str, Any]:
    depths = sorted(set(jax.tree.leaves(jax.tree_util.tree_map_with_path(depth_of, params))))  # None is no leaf
    names = {n: f"stacked_{n}" for n in depths} if len(depths) > 1 else {depths[0] if depths else 0: "stacked"}

    def of(own: int | None) -> Any:  # the other parameters become None, an empty subtree
      return jax.tree_util.tree_map_with_path(lambda path, x: x if depth_of(path, x) == own else None, params)

    return {name: of(own) for own, name in {**names, None: "single"}.items()}

  def each_layer(name: str, function: Callable[..., Any], *trees: Any) -> Any:  # vmap wants something to map over
    return function(*trees) if name == "single" or not jax.tree.leaves(trees[0]) else jax.vmap(function)(*trees)

  def init(params: Any) -> Any:
    return {name: each_layer(name, inner.init, group) for name, group in groups(params).items()}

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    of_grads, of_params = groups(grads), groups(params)
    made = {n: each_layer(n, inner.update, of_grads[n], state[n], of_params[n]) for n in of_grads}
    updates = [update for update, _ in made.values()]
    one = lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None)
    merged = jax.tree.map(one, *updates, is_leaf=lambda x: x is None)
    return merged, {name: state for name, (_, state) in made.items()}

  return optax.GradientTransformation(init, update)
