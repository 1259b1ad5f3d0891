"""Checkpoints of a run: Orbax, asynchronous; parameters, optimizer state, and a small record of where the run stands.

The only file that imports orbax. A checkpoint is `checkpoints/STEP/{params,opt,run}`: the parts are separate items, so
that parameters load without the optimizer. Of adapters no frozen weight is in it: those lie where the stage started.
Orbax restores damaged files without a word; a manifest (`train/manifest.py`) that is committed with each step tells.
"""

import dataclasses
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers as policies

from train import manifest, processes, upkeep

_ITEMS = ("params", "opt", "run")
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # what a save that was cut short leaves behind


@dataclasses.dataclass
class _Pinned(policies.PreservationPolicy):
  """Preserves one step, which may change; None = none."""

  step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    return [checkpoint.step == self.step for checkpoint in checkpoints]


def _not_told(record: logging.LogRecord) -> bool:
  """Drops what asyncio says of a failed save's other arrays: they met the error that is told already."""
  return "exception was never retrieved" not in record.getMessage()


class NotSaved(OSError):
  """A checkpoint could not be written; the ones before are as they were."""


class Checkpoints:
  """The checkpoints of one stage's workdir.

  Args:
    workdir: the stage's folder; checkpoints lie in `workdir/checkpoints`.
    keep: newest checkpoints that stay on disk, beside the one that is pinned; None keeps all.
    writes: the folder is locked for this run, and steps that are damaged are set aside; else it is only read.

  Raises:
    ValueError: another run writes to it; no step in it is whole; or the processes do not share it.
    OSError: it cannot be written to.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None, writes: bool = False):
    self.folder = Path(workdir).resolve() / "checkpoints"
    self._keep, self._writes, self._whole = keep, writes, set()
    self._held, self._failed, self._pinned = ExitStack(), False, _Pinned()
    if writes:
      processes.first(lambda: self._held.enter_context(upkeep.lock(self.folder)))
      try:
        processes.check_shared(self.folder.parent)
        self.latest()
        _ = self._manager
      except BaseException:
        self._held.close()
        raise

  @cached_property
  def _manager(self) -> ocp.CheckpointManager:
    folder, about = self.folder, self.folder.parent / "config.json"

    class Whole(ocp.path.atomicity.AtomicRenameTemporaryPath):
      """A step's folder before its commit, by the first process, after all have written: it gets its manifest."""

      async def finalize(self) -> None:
        part, final = Path(self.get()), Path(self.get_final())
        if final.parent == folder:  # not one of its items
          config = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
          record = json.loads((part / "run" / "metadata").read_text(encoding="utf-8"))
          manifest.write(part, int(final.name), config, record.get("fingerprint", {}))
        await super().finalize()
        manifest.sync(final.parent)

    only_read = {} if self._writes else {"save_root_metadata": False}
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), self._pinned]),
      create=self._writes,
      cleanup_tmp_directories=self._writes,
      temporary_path_class=Whole,
      **only_read,
    )
    return ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

  def latest(self) -> int | None:
    """Returns the newest step whose files are those that were written, or None; says which it passes over.

    Every process must ask.

    Raises:
      ValueError: there are steps, and none is whole.
    """

    def find() -> int:
      found, damaged = upkeep.newest_whole(self.folder, self._whole)
      for step, wrong in damaged.items():
        done = f"set aside as {step}{upkeep.ASIDE}" if self._writes else "passed over"
        print(f"checkpoint {step} in {self.folder} is damaged and {done}: {wrong}", flush=True)
        if self._writes:
          upkeep.set_aside(self.folder, step)
      return -1 if found is None else found

    newest = processes.first(find)
    self._whole |= {newest}
    return None if newest < 0 else newest

  def chosen(self) -> int | None:
    """Returns the step whose parameters are the stage's: the best, where its run looks for one, else the newest.

    Says so where the best one is damaged or gone, and takes the newest then. Every process must ask.
    """
    newest = self.latest()
    best = None if newest is None else self._record(newest).get("best")
    if not best or best["step"] == newest or not self.has(best["step"]):
      return newest
    return best["step"]

  def has(self, step: int) -> bool:
    """Says whether a step is there and whole, and in words if it is not; every process must ask."""

    def look() -> int:
      wrong = manifest.problem(self.folder / str(step)) if (self.folder / str(step)).is_dir() else "it is gone"
      if wrong and step not in self._whole:
        print(f"checkpoint {step} in {self.folder}, the best one, cannot be used: {wrong}", flush=True)
      return 0 if wrong else 1

    there = bool(processes.first(look))
    self._whole |= {step} if there else set()
    return there

  def pin(self, step: int | None) -> None:
    """Keeps a step, and no other beside the newest ones, from the next save on."""
    self._pinned.step = step

  def save(self, step: int, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Starts a save and returns once the arrays are copied; the writing goes on in the background.

    Args:
      step: steps done.
      state: `params`, `opt` (may be missing: weights that nothing trained here), `step`; `frozen` is not stored
        (`train/loop.py: stored` puts it among `params` where it is to be).
      run: JSON-able record: input position, tokens and seconds so far, fingerprint of the input.

    Raises:
      NotSaved: this save or the one before failed, or the step is not newer than the newest one.
    """
    if not self._writes:
      raise ValueError(f"{self.folder} was opened for reading; open it with writes=True")
    arrays = {name: ocp.args.StandardSave(state[name]) for name in ("params", "opt") if name in state}
    record = ocp.args.JsonSave({**run, "id": uuid.uuid4().hex})  # see `identity`
    with self._saving(f"checkpoint {step}"):
      if not self._manager.save(step, args=ocp.args.Composite(**arrays, run=record)):
        raise ValueError(f"it must be newer than {self._manager.latest_step()}")

  @contextmanager
  def _saving(self, what: str) -> Iterator[None]:
    """Makes an error that names the folder and what is still there of any that a save ends with."""
    try:
      yield
    except Exception as error:
      self._failed = True
      logging.getLogger("asyncio").addFilter(_not_told)
      reason = " ".join(str(error).split())
      reason = reason if len(reason) < 400 else f"{reason[:100]} … {reason[-250:]}"  # the system's word comes last
      raise NotSaved(
        f"{what} was not saved in {self.folder}: {reason}. There are the steps {upkeep.steps(self.folder)}. Make "
        "room or mend the folder; the same command goes on from the newest"
      ) from error

  def restore_run(self, step: int) -> dict[str, Any]:
    """Returns the `run` record of a step, as it was given to `save`."""
    return {key: value for key, value in self._record(step).items() if key != "id"}

  def identity(self) -> dict[str, Any]:
    """Returns what tells the chosen checkpoint from any other: how far its run was, and an id of its own."""
    chosen = self.chosen()
    record = {} if chosen is None else self._record(chosen)
    return {key: record.get(key) for key in ("steps", "tokens", "seconds", "id")}

  def _record(self, step: int) -> dict[str, Any]:
    return self._restore(step, run=ocp.args.JsonRestore())["run"]

  def restore_params(self, step: int, like: Any) -> Any:
    """Returns the parameters of a step, laid out as `like` (shapes with shardings) says.

    Raises:
      ValueError: the step is damaged, or holds other parameters; names the first that differs.
    """
    self._check_leaves(step, "params", like)
    return self._restore(step, params=ocp.args.StandardRestore(like))["params"]

  def restore_state(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the training state of a step, laid out as `like` (shapes with shardings) says; nothing is frozen.

    Raises:
      ValueError: as `restore_params`; or the step has no optimizer state.
    """
    for item in ("params", "opt"):
      self._check_leaves(step, item, like[item])
    items = {item: ocp.args.StandardRestore(like[item]) for item in ("params", "opt")}
    restored = self._restore(step, **items)
    step_array = jax.device_put(jax.numpy.int32(step), like["step"].sharding)
    return {"params": restored["params"], "frozen": {}, "opt": restored["opt"], "step": step_array}

  def _restore(self, step: int, **items: Any) -> Any:
    def check() -> int:
      if step not in self._whole and (wrong := manifest.problem(self.folder / str(step))):
        raise ValueError(f"checkpoint {step} in {self.folder} is damaged: {wrong}")
      return step

    self._whole |= {processes.first(check)}
    return self._manager.restore(step, args=ocp.args.Composite(**items))

  def _check_leaves(self, step: int, item: str, like: Any) -> None:
    """Compares names and shapes with those in the checkpoint; Orbax pads and cuts, or names none."""
    if not (self.folder / str(step) / item).is_dir():
      raise ValueError(f"checkpoint {step} in {self.folder} has no {item}: a run cannot go on from it; init_from can")
    stored, wanted = _shapes(self._stored(step, item)), _shapes(like)
    for name in (*wanted, *(stored.keys() - wanted.keys())):
      then, now = stored.get(name, "not there"), wanted.get(name, "not there")
      if then != now:
        raise ValueError(f"checkpoint {step} in {self.folder}: {item} {name} is {then}, the model's is {now}")

  def _stored(self, step: int, item: str) -> Any:
    """Returns the shapes of an item of a step."""
    handler = ocp.StandardCheckpointHandler()
    try:
      return handler.metadata(self._manager.directory / str(step) / item).tree
    finally:
      handler.close()

  def close(self) -> None:
    """Waits until everything is written; without it the save in flight would be lost.

    Raises:
      NotSaved: it could not be written.
    """
    with self._held:
      if "_manager" in self.__dict__:
        manager = self.__dict__.pop("_manager")
        try:
          with self._saving("the last checkpoint"):
            manager.wait_until_finished()
          manager.close()
        finally:
          if self._failed and processes.is_first():
            self._sweep()

  def _sweep(self) -> None:
    """Deletes what a save that failed has left, for it may be what fills the disk; its writers may not be done yet."""
    for _ in range(20):
      left = list(self.folder.glob(_UNFINISHED))
      if not left:
        return
      for part in left:
        shutil.rmtree(part, ignore_errors=True)
      time.sleep(0.05)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns path -> shape; Orbax stores tuples and their names as plain containers, which gives the same paths."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def with_layout(shapes: Any, mesh: Mesh) -> Any:
  """Gives each traced shape the concrete sharding that its type says (what has none is whole on every device).

  Args:
    shapes: a tree from `jax.eval_shape` under `jax.set_mesh(mesh)`.
    mesh: the mesh.
  """

  def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    layout = leaf.sharding.spec if leaf.sharding is not None else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout))

  return jax.tree.map(place, shapes)
