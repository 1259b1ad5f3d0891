"""Many processes as one run: how they find each other, what only the first does, and whether they share a folder.

Every process runs the same program over the same global arrays; files are written and lines are printed by process 0.
The functions here that wait for all processes must be called by all of them, in the same order.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

ENVIRONMENT = {"coordinator": "ARGOT_COORDINATOR", "count": "ARGOT_PROCESSES", "index": "ARGOT_PROCESS"}
# What launchers say of the number of processes, by the variable that says it.
LAUNCHERS: dict[str, Callable[[str], int]] = {
  "SLURM_STEP_NUM_TASKS": int,
  "OMPI_COMM_WORLD_SIZE": int,
  "PMI_SIZE": int,
  "MEGASCALE_NUM_SLICES": int,
  "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
LEAVE_SECONDS = 60  # that a process which ends, after an error of its own, waits for the others; then all end
SEEN_SECONDS = 20  # that a shared file system may take to show another host's file


class Address(NamedTuple):
  """Where a process belongs.

  Attributes:
    coordinator: "HOST:PORT" of process 0.
    count: processes in all.
    index: of this one.
  """

  coordinator: str
  count: int
  index: int


def start(settings: Mapping[str, Any]) -> None:
  """Joins the other processes of this run; must come before JAX is used. One process alone: nothing happens.

  They are found by `settings`, by the variables of `ENVIRONMENT`, or by JAX: TPU VMs, one slice or several; GKE;
  SLURM (srun); Open MPI. Process 0 says what was found; the others print nothing from here on but errors.

  Args:
    settings: `config.processes`.

  Raises:
    ValueError: settings that are incomplete, processes that did not come, or a launcher whose processes JAX does not
      find (each would train alone, in the same folder).
  """
  timeouts = {"initialization_timeout": int(settings["initialization_timeout_seconds"])}
  timeouts |= {"heartbeat_timeout_seconds": int(settings["heartbeat_timeout_seconds"])}
  timeouts["shutdown_timeout_seconds"] = LEAVE_SECONDS
  found = address(settings, os.environ)
  if jax.distributed.is_initialized() or (found.count == 1 if found else alone(os.environ)):
    return
  try:
    jax.distributed.initialize(*(found or ()), **timeouts)
  except (RuntimeError, ValueError) as error:
    if found or not _nothing_found(error):
      where = f"{found.coordinator} for {found.count} processes, this is {found.index}" if found else "as JAX found it"
      raise ValueError(
        f"the processes of this run did not find each other ({where}): {str(error).splitlines()[0]}\n"
        "Start all of them with the same coordinator and count; see README, 'On many machines'. One process alone: "
        "config.processes.count=1"
      ) from error
    if expected := launched(os.environ):
      raise ValueError(
        f"{expected} says that there are several processes, but JAX does not find the others; say where they are: "
        f"{', '.join(ENVIRONMENT.values())} (or config.processes); one process alone: config.processes.count=1"
      ) from error
    return
  if jax.process_count() > 1:
    local, whole = jax.local_device_count(), jax.device_count()
    way = f"at {found.coordinator}" if found else f"by {launched(os.environ) or 'JAX'}"
    if jax.process_index():
      sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
    print(f"processes: {jax.process_count()} {way}; {whole} devices, {local} of them here", flush=True)


def _nothing_found(error: Exception) -> bool:
  """Says whether JAX found no cluster, or (in a notebook) has been in use before."""
  return "coordinator_address should be defined" in str(error) or "must be called before" in str(error)


def address(settings: Mapping[str, Any], environment: Mapping[str, str]) -> Address | None:
  """Returns the address that a config or the environment gives; the config wins. None where neither says anything.

  Args:
    settings: `config.processes`; "", 0 and -1 are what is not set.
    environment: such as `os.environ`.

  Raises:
    ValueError: only a part is set, or a value that cannot be.

  Example:
    >>> unset = {"coordinator": "", "count": 0, "index": -1}
    >>> address(unset, {"ARGOT_COORDINATOR": "a:1", "ARGOT_PROCESSES": "2", "ARGOT_PROCESS": "1"})
    Address(coordinator='a:1', count=2, index=1)
  """
  unset = {"coordinator": "", "count": 0, "index": -1}
  given = {key: settings[key] for key, value in unset.items() if settings[key] != value}
  for key, name in ENVIRONMENT.items():
    if key not in given and environment.get(name):
      value = environment[name]
      if key != "coordinator" and not value.isdigit():
        raise ValueError(f"{name}={value}: expected a whole number")
      given[key] = value if key == "coordinator" else int(value)
  if not given:
    return None
  if given.get("count") == 1 and given.get("index", 0) == 0:
    return Address(given.get("coordinator", ""), 1, 0)
  if missing := [key for key in unset if key not in given]:
    lacking = " and ".join(f"config.processes.{key} (or {ENVIRONMENT[key]})" for key in missing)
    raise ValueError(f"several processes need all of {', '.join(unset)}; {given} is set, {lacking} is missing")
  found = Address(str(given["coordinator"]), int(given["count"]), int(given["index"]))
  host, _, port = found.coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(f"the coordinator's address is {found.coordinator!r}: expected HOST:PORT of process 0")
  if not 0 <= found.index < found.count:
    raise ValueError(f"process {found.index} of {found.count}: expected one from 0 to {found.count - 1}")
  return found


def launched(environment: Mapping[str, str]) -> str:
  """Returns what a launcher says of several processes, as `NAME=value`; "" where none does.

  Example:
    >>> launched({"OMPI_COMM_WORLD_SIZE": "4"}), launched({"OMPI_COMM_WORLD_SIZE": "1"})
    ('OMPI_COMM_WORLD_SIZE=4', '')
  """
  for name, count in LAUNCHERS.items():
    if environment.get(name) and count(environment[name]) > 1:
      return f"{name}={environment[name]}"
  return ""


def alone(environment: Mapping[str, str]) -> bool:
  """Says whether a launcher says that there is one process: JAX would take all of its GPUs but one from it."""
  return any(environment.get(name) == "1" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))


def is_first() -> bool:
  """Says whether this process is the one that writes files."""
  return jax.process_index() == 0


def agree(value: bool) -> bool:
  """Returns what process 0 says, for a decision that all must take alike; waits for all."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def together(make: Callable[[], Any]) -> Any:
  """Does something on every process's host, such as reading what may be ready on one and not on another.

  Args:
    make: what is done, in a thread of its own where there are several processes; must not use devices.

  Returns:
    What `make` returned here, when it is done everywhere.

  Raises:
    ValueError: where it failed on another process, which raises what `make` raised.
  """
  if jax.process_count() == 1:
    return make()
  # Collectives time out within minutes: while the threads work, all ask again and again how the others stand.
  working, done, failed = 0, 1, 2
  states = [working]
  with ThreadPoolExecutor(1) as executor:
    future = executor.submit(make)
    while working in states and failed not in states:
      wait([future], 0.5)
      here = working if not future.done() else failed if future.exception() else done
      states = multihost_utils.process_allgather(np.int32(here)).tolist()
  result = future.result()
  if failed in states:
    raise ValueError(f"process {states.index(failed)} failed; its error says why")
  return result


def first(make: Callable[[], Any]) -> int:
  """Lets process 0 do something on its host, such as reading or writing files; the others wait until it is done.

  Args:
    make: what it does; see `together`.

  Returns:
    On all processes the whole number that `make` returned, 0 where it returned something else.

  Raises:
    ValueError: on the other processes, where it failed on process 0, which raises what `make` raised.
  """
  number = _number(together(make if is_first() else lambda: None))
  return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _number(value: Any) -> int:
  return value if isinstance(value, int) else 0


def check_shared(folder: Path) -> None:
  """Checks that all processes see the same folder; waits for all.

  Args:
    folder: the workdir; made where it is missing.

  Raises:
    ValueError: on all processes, where one does not see what process 0 wrote.
  """
  if jax.process_count() == 1:
    return
  name = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
  file = folder / f".shared-{name:08x}"
  if is_first():
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(str(name), encoding="utf-8")
  multihost_utils.sync_global_devices(f"written {name}")
  until = time.monotonic() + SEEN_SECONDS
  while not (sees := _holds(file, str(name))) and time.monotonic() < until:
    time.sleep(0.2)
  everywhere = np.ravel(multihost_utils.process_allgather(np.int32(sees)))
  if is_first():
    file.unlink()
  if blind := [index for index, seen in enumerate(everywhere) if not seen]:
    raise ValueError(
      f"--workdir={folder} is not shared: processes {blind} of {len(everywhere)} do not see what process 0 writes "
      "there; give all of them one --workdir on a disk that they share (NFS, Filestore, Lustre, a mounted bucket)"
    )


def _holds(file: Path, text: str) -> bool:
  try:
    return file.read_text(encoding="utf-8") == text
  except OSError:
    return False
