"""Adapters in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`, written and read.

PEFT's adapter of a module W [out, in] is A [r, in] and B [out, r]; W + scale·B·A is what our weight with a and b is, in
the dims that `models/families.py` gives the weight's row. Where their module is several of our weights side by side
(GPT-2's `c_attn` is query, key and value), their adapter has our A's one above the other and our B's along a diagonal.

Reference:
  PEFT 0.21, `peft.LoraConfig` and `save_pretrained`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from models.families import Config, Family
from models.gpt import GPTConfig
from models.lora import contracted_dims, scale_of
from models.model import Model
from models.module import Params
from models.rows import Row

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Of PEFT's ways to start adapters: those that leave the base weights as they are.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that make of an adapter something else than W + scale·B·A.
OTHERWISE = ("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")
OTHERWISE += ("target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
OTHERWISE += ("use_bdlora", "velora_config")

Pair = tuple[np.ndarray, np.ndarray]  # A [r, in] and B [out, r] of one module or one of our weights in one layer


class Adapters(NamedTuple):
  """What a PEFT folder holds, in our form.

  Attributes:
    params: nested dict of float32 adapters, numpy. One that PEFT has for some layers only is zero in the others; ranks
      that differ from layer to layer are filled up with zeros.
    scale: what `lora.combine` and `lora.merge` take.
  """

  params: Params
  scale: float


def write(
  folder: Path,
  adapters: Params,
  family: Family,
  config: Config,
  *,
  rank: int,
  alpha: float,
  rank_stabilised: bool,
  base: str = "",
) -> None:
  """Writes adapters for PEFT, to be loaded onto the base weights in the same family's form.

  Args:
    folder: is made where it is missing.
    adapters: nested dict of adapters.
    family: one of `FAMILIES`.
    config: the model's.
    rank, alpha, rank_stabilised: see `lora.scale_of`.
    base: name or folder of the base weights, which PEFT's `AutoPeftModel` loads.
  """
  flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(jax.device_get(adapters), sep="/").items()}
  tensors, ranks, chosen, turned = {}, {}, set(), False
  for module, rows in _modules(family, config).items():
    stacks = [_theirs(row, flat) for row in rows]
    layers = max(len(stack) for stack in stacks)
    for layer in range(layers):
      name = module.format(layer)
      a, b = _side_by_side([stack[layer] if stack else None for stack in stacks])
      tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
      ranks[name] = len(a)
    if layers:
      chosen.add(module)
      turned |= any(_turned(row, flat) for row in rows)
  others = {re.escape(name): own for name, own in ranks.items() if own != rank}
  # The same scale for every rank, as ours is.
  alphas = {key: alpha * (math.sqrt(own / rank) if rank_stabilised else own / rank) for key, own in others.items()}
  values = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM" if family.form is GPTConfig else "SEQ_2_SEQ_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": _plain(alpha),
    "use_rslora": rank_stabilised,
    "target_modules": _targets(chosen, family.rows(config)) or sorted(ranks),
    "rank_pattern": others,
    "alpha_pattern": {key: _plain(value) for key, value in alphas.items()},
    "fan_in_fan_out": turned,
    "bias": "none",
    "lora_dropout": 0.0,
    "inference_mode": True,
  }
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _plain(number: float) -> float | int:
  return int(number) if float(number).is_integer() else number


def _modules(family: Family, config: Config) -> dict[str, list[Row]]:
  """Returns the modules that can have adapters, by name with `{}` for the layer, and our weights side by side in it."""
  modules: dict[str, list[Row]] = {}
  for row in family.rows(config):
    if contracted_dims(row.ours) is not None:
      modules.setdefault(row.theirs.removesuffix(".weight"), []).append(row)
  return {name: sorted(rows, key=lambda row: row.part) for name, rows in modules.items()}


def _targets(chosen: set[str], rows: Sequence[Row]) -> list[str]:
  """Returns the last names of the chosen modules, as PEFT users write them; none where others have these names, too."""
  last = {module.rpartition(".")[2] for module in chosen}
  named = {row.theirs.rpartition(".")[0] for row in rows if row.theirs.rpartition(".")[0].rpartition(".")[2] in last}
  return sorted(last) if named == chosen else []


def _orders(row: Row, weight: tuple[int, ...]) -> tuple[list[int], list[int]]:
  """Returns which of our dims (L apart), in their order, are their `in` and their `out`."""
  count = contracted_dims(row.ours)
  order = row.dims(weight).order
  return [dim for dim in order if dim < count], [dim for dim in order if dim >= count]


def _weight(row: Row, flat: Mapping[str, np.ndarray]) -> tuple[int, ...]:
  return (*flat[f"{row.ours}/lora_a"].shape[:-1], *flat[f"{row.ours}/lora_b"].shape[2:])


def _turned(row: Row, flat: Mapping[str, np.ndarray]) -> bool:
  """Says whether their module is [in, out], as GPT-2's are; PEFT must be told."""
  return f"{row.ours}/lora_a" in flat and row.dims(_weight(row, flat)).order[0] < contracted_dims(row.ours)


def _theirs(row: Row, flat: Mapping[str, np.ndarray]) -> list[Pair]:
  """Returns one of our stacked adapters as A and B of each layer; none where there is no adapter."""
  if f"{row.ours}/lora_a" not in flat:
    return []
  a, b = flat[f"{row.ours}/lora_a"], flat[f"{row.ours}/lora_b"]
  count, layers, rank = contracted_dims(row.ours), len(a), a.shape[-1]
  into, out_of = _orders(row, _weight(row, flat))
  # a: L, in…, R -> L, R, in;  b: L, R, out… -> L, out, R
  a = a.transpose(0, a.ndim - 1, *(1 + dim for dim in into)).reshape(layers, rank, -1)
  b = b.transpose(0, *(2 + dim - count for dim in out_of), 1).reshape(layers, -1, rank)
  return [(np.ascontiguousarray(a[layer]), np.ascontiguousarray(b[layer])) for layer in range(layers)]


def _side_by_side(parts: Sequence[Pair | None]) -> Pair:
  """Joins the adapters of weights that are one module there: A's stacked, B's on a diagonal; exact, of summed rank."""
  present = [part for part in parts if part is not None]
  if len(parts) == 1:
    return present[0]
  width, at = len(present[0][1]), 0
  a = np.concatenate([part[0] for part in present])
  b = np.zeros((len(parts) * width, len(a)), np.float32)
  for number, part in enumerate(parts):
    if part is not None:
      b[number * width : (number + 1) * width, at : at + len(part[0])] = part[1]
      at += len(part[0])
  return a, b


def read(folder: Path, family: Family, model: Model) -> Adapters:
  """Reads adapters that PEFT wrote.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    family: of the base weights, one of `FAMILIES`.
    model: of the base weights.

  Raises:
    FileNotFoundError: a file is missing; a pickle is not read.
    ValueError: a damaged file, a kind of adapter that is not W + scale·B·A, or modules that are not this model's.
  """
  values, pairs = _settings(folder), _pairs(folder, family)
  scale = scale_of(values["r"], values["lora_alpha"], values["use_rslora"])
  scaled = {name: (a, b * (_scale(name, len(a), values) / scale)) for name, (a, b) in pairs.items()}
  shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
  flat, modules = {}, _modules(family, model.config)
  for module, rows in modules.items():
    layers = rows[0].layers(shapes[rows[0].ours].shape)
    found = [scaled.pop(module.format(layer), None) for layer in range(layers)]
    for row in rows:
      parts = [pair and _part(pair, row.part) for pair in found]
      if any(part is not None for part in parts):
        flat |= _ours(folder, row, shapes[row.ours].shape, parts)
  if scaled:
    known = ", ".join(sorted(modules))
    raise ValueError(
      f"{folder} has {len(scaled)} adapters such as {min(scaled)!r}; a {model.config} has them at {known}"
    )
  return Adapters(unflatten_dict(flat, sep="/"), scale)


def _settings(folder: Path) -> dict[str, Any]:
  try:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    needed = {"r": int(values["r"]), "lora_alpha": float(values["lora_alpha"]), "peft_type": values["peft_type"]}
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{folder} has no {CONFIG}; is it a folder that PEFT's save_pretrained wrote?") from error
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{folder / CONFIG} cannot be read ({error!r}); fetch it again") from error
  if needed["peft_type"] != "LORA" or needed["r"] < 1:
    raise ValueError(f"{folder / CONFIG}: expected peft_type 'LORA' and r above 0, got {needed}")
  different = [key for key in OTHERWISE if values.get(key)]
  different += ["bias"] if values.get("bias", "none") != "none" else []
  different += ["init_lora_weights"] if values.get("init_lora_weights") not in STARTS else []
  if different:
    shown = ", ".join(f"{key}={values[key]!r}" for key in different)
    raise ValueError(f"{folder / CONFIG} has {shown}: such adapters are not supported; merge them with PEFT first")
  patterns = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
  return {**needed, **patterns, "use_rslora": bool(values.get("use_rslora"))}


def _scale(name: str, rank: int, values: Mapping[str, Any]) -> float:
  """Returns the scale of one module, whose alpha may be its own."""
  found = (own for key, own in values["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", name))
  return scale_of(rank, next(found, values["lora_alpha"]), values["use_rslora"])


def _pairs(folder: Path, family: Family) -> dict[str, Pair]:
  """Returns A and B by the name of their module, as the family's whole model names it."""
  if not (folder / WEIGHTS).exists():
    pickle = (folder / "adapter_model.bin").exists()
    advice = (
      "; adapter_model.bin is not read, since loading it can run code: convert it (PEFT, in a place you trust: "
      "`AutoPeftModel.from_pretrained(…).save_pretrained(…)` writes safetensors)"
    )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}{advice if pickle else ''}")
  try:
    with safetensors.safe_open(folder / WEIGHTS, "np") as opened:
      tensors = {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file ({error}); fetch it again") from error
  halves: dict[str, dict[str, np.ndarray]] = {}
  for name, value in tensors.items():
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
    if not match or value.ndim != 2:
      raise ValueError(f"{folder / WEIGHTS}: {name!r} {value.shape} is not an adapter of a matrix; it is not supported")
    halves.setdefault(match[1], {})[match[2]] = value
  for name, half in halves.items():
    if set(half) != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1]:
      shapes = {key: value.shape for key, value in half.items()}
      raise ValueError(f"{folder / WEIGHTS}: {name!r} has {shapes}, expected A [r, in] and B [out, r]")
  prefix = "" if any(name.startswith(family.prefix) for name in halves) else family.prefix
  return {prefix + name: (half["A"], half["B"]) for name, half in halves.items()}


def _part(pair: Pair, part: tuple[int, int]) -> Pair | None:
  """Returns the adapter of one of the weights that are a module; what is zero in B says nothing of this one."""
  a, b = pair
  number, count = part
  if count == 1:
    return pair
  width = len(b) // count
  b = b[number * width : (number + 1) * width]
  used = b.any(axis=0)
  return (a[used], b[:, used]) if used.any() else None


def _ours(folder: Path, row: Row, weight: tuple[int, ...], parts: Sequence[Pair | None]) -> dict[str, np.ndarray]:
  """Returns one of our stacked adapters from A and B of each layer, filled up with zeros to the highest rank."""
  count, rank = contracted_dims(row.ours), max(len(part[0]) for part in parts if part is not None)
  into, out_of = _orders(row, weight)
  dims = weight[1:]
  wide, high = (math.prod(dims[dim] for dim in order) for order in (into, out_of))
  a, b = np.zeros((len(parts), rank, wide), np.float32), np.zeros((len(parts), high, rank), np.float32)
  for layer, part in enumerate(parts):
    if part is None:
      continue
    if (part[0].shape[1], part[1].shape[0]) != (wide, high):
      got = f"in {part[0].shape[1]} and out {part[1].shape[0]}"
      raise ValueError(f"{folder}: the adapter of {row.theirs.format(layer)!r} has {got}, the weight {wide} and {high}")
    a[layer, : len(part[0])], b[layer, :, : len(part[0])] = part
  # The way back of `_theirs`: L, R, in -> L, in…, R and L, out, R -> L, R, out…, each in our order of dims.
  a = a.reshape(len(parts), rank, *(dims[dim] for dim in into))
  a = a.transpose(0, *(2 + into.index(dim) for dim in range(count)), 1)
  b = b.reshape(len(parts), *(dims[dim] for dim in out_of), rank)
  b = b.transpose(0, b.ndim - 1, *(1 + out_of.index(dim) for dim in range(count, len(dims))))
  return {f"{row.ours}/lora_a": np.ascontiguousarray(a), f"{row.ours}/lora_b": np.ascontiguousarray(b)}
