"""Flags of a verb: parsed by absl and ml_collections from the verb's own argument list; help with examples."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

Flags = flags.FlagValues


def new() -> Flags:
  """Returns an empty set of flags."""
  return flags.FlagValues()


def config(values: Flags) -> None:
  """Adds `--config=FILE[:ARG]` and its overrides `--config.key=value`."""
  config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:ARG", flag_values=values, lock_config=True)


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


def boolean(values: Flags, name: str, default: bool, text: str) -> None:
  """Adds a flag that is given or not."""
  flags.DEFINE_boolean(name, default, text, flag_values=values)


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
