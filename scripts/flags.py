"""Flags of a verb: parsed by absl and ml_collections from the verb's own argument list; help with examples."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

Flags = flags.FlagValues
# Where a config may have keys of any name.
OPEN = ("data.mixture.", "arms.replay_mixture.", "model.overrides.", "sources.", "tasks.", "retain.", "gate.")


def new() -> Flags:
  """Returns an empty set of flags."""
  return flags.FlagValues()


def config(values: Flags) -> None:
  """Adds `--config=FILE[:ARG]` and its overrides `--config.key=value`."""
  config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:ARG", flag_values=values, lock_config=True)
  parser = values["config"].parser
  load = parser.parse
  parser.parse = lambda path: with_keys(load(path), sys.argv)  # ml_collections only overrides keys that are there


def given(values: Flags) -> Mapping[str, Any]:
  """Returns what `--config.key=value` sets: dotted key -> value."""
  return config_flags.get_override_values(values["config"])


def with_keys(loaded: Any, arguments: Sequence[str]) -> Any:
  """Gives a config the keys that `--config.key=value` may set and that it lacks, in place, to be overridden.

  These are any key of the config in a stage (`stages.multitask.lora.rank`), and any name where names are free.

  Raises:
    flags.Error: there is no such key.
  """
  if not isinstance(loaded, ConfigDict):  # a file that failed to load says so when it is read
    return loaded
  for word in arguments:
    match = re.fullmatch(r"--?config\.([\w.]+)(=.*)?", word, re.DOTALL)
    if not match or _find(loaded, match[1]) is not None:
      continue
    path = match[1]
    stage = re.match(r"stages\.(\w+)\.", path)
    key = path.removeprefix(stage[0]) if stage and stage[1] in loaded.get("stages", {}) else path
    value = placeholder(object) if key.startswith(OPEN) else _find(loaded, key)
    if value is None:
      raise flags.Error(f"--config.{path}: {_unknown(loaded, key)}")
    for name in reversed(path.split(".")):
      value = {name: value}
    with loaded.unlocked():
      loaded.update(value)
  return loaded


def _find(config: ConfigDict, key: str) -> Any:
  """Returns what stands at a dotted key; None where there is no such key."""
  there: Any = config
  for name in key.split("."):
    if not isinstance(there, ConfigDict) or name not in there:
      return None
    there = there[name]
  return there


def _unknown(config: ConfigDict, key: str) -> str:
  """Says at which of its names a dotted key fails, and what is there."""
  where, _, name = key.rpartition(".")
  while where and not isinstance(_find(config, where), ConfigDict):
    where, _, name = where.rpartition(".")
  known, place = sorted(_find(config, where) if where else config), f"config{where and f'.{where}'}"
  if name in known:
    return f"{place}.{name} is a value, and has no keys"
  near = difflib.get_close_matches(name, known, 1)
  meant = f" (is {near[0]!r} meant?)" if near else ""
  return f"{place} has no key {name!r}{meant}; known are {known}"


def string(values: Flags, name: str, default: str | None, text: str) -> None:
  """Adds a flag that takes a string."""
  flags.DEFINE_string(name, default, text, flag_values=values)


def integer(values: Flags, name: str, default: int | None, text: str) -> None:
  """Adds a flag that takes an integer."""
  flags.DEFINE_integer(name, default, text, flag_values=values)


def number(values: Flags, name: str, default: float | None, text: str) -> None:
  """Adds a flag that takes a number."""
  flags.DEFINE_float(name, default, text, flag_values=values)


def strings(values: Flags, name: str, text: str) -> None:
  """Adds a flag that takes a string, and may be given several times."""
  flags.DEFINE_multi_string(name, [], text, flag_values=values)


def boolean(values: Flags, name: str, text: str) -> None:
  """Adds a flag that is given or not."""
  flags.DEFINE_boolean(name, False, text, flag_values=values)


def parse(values: Flags, verb: str, text: str, arguments: Sequence[str], required: Sequence[str]) -> Flags:
  """Parses a verb's arguments; on `--help` or a mistake, says so and exits (0 or 2).

  Args:
    values: the flags.
    verb: its name.
    text: its help: what it does, with examples.
    arguments: what stood after the verb.
    required: flags that must be given.
  """
  if any(argument in ("-h", "--help", "-help") for argument in arguments):
    print(f"{text.strip()}\n\nFlags:{values.get_help()}")
    sys.exit(0)
  sys.argv = [f"argot {verb}", *arguments]  # ml_collections finds its overrides there
  try:
    rest = values(sys.argv)[1:]
    if rest:
      raise flags.Error(f"arguments are flags such as --name=value, got {rest}")
    if missing := [name for name in required if getattr(values, name) in (None, "")]:
      raise flags.Error(f"missing --{', --'.join(missing)}")
    if "config" in values:
      values.config.seed  # noqa: B018  a file that failed to load says so only when it is read
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"argot {verb}: {str(error).strip()}\nSee: argot {verb} --help")
  return values
