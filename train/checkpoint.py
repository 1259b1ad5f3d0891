"""Checkpoints of a run: Orbax, asynchronous; parameters, optimizer state, and a small record of where the run stands.

The only file that imports orbax. A checkpoint is `checkpoints/STEP/{params,opt,run}`: the parts are separate items, so
that parameters load without the optimizer. Of adapters no frozen weight is in it: those lie where the stage started.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_ITEMS = ("params", "opt", "run")


class Checkpoints:
  """The checkpoints of one stage's workdir.

  Args:
    workdir: the stage's folder; checkpoints lie in `workdir/checkpoints`.
    keep: newest checkpoints that stay on disk; None keeps all.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None):
    self.folder = Path(workdir).resolve() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

  def latest(self) -> int | None:
    """Returns the newest committed step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Starts a save and returns once the arrays are copied; the writing goes on in the background.

    Args:
      step: steps done.
      state: `params`, `opt` (may be missing: weights that nothing trained here), `step`; `frozen` is not stored
        (`train/loop.py: stored` puts it among `params` where it is to be).
      run: JSON-able record: input position, tokens and seconds so far, fingerprint of the input.

    Raises:
      RuntimeError: Orbax refused the step (it is not newer than the newest one).
    """
    arrays = {name: ocp.args.StandardSave(state[name]) for name in ("params", "opt") if name in state}
    record = ocp.args.JsonSave({**run, "id": uuid.uuid4().hex})  # see `identity`
    saved = self._manager.save(step, args=ocp.args.Composite(**arrays, run=record))
    if not saved:
      raise RuntimeError(f"checkpoint {step} was not saved in {self.folder}: the newest there is {self.latest()}")

  def restore_run(self, step: int) -> dict[str, Any]:
    """Returns the `run` record of a step, as it was given to `save`."""
    return {key: value for key, value in self._record(step).items() if key != "id"}

  def identity(self) -> dict[str, Any]:
    """Returns what tells the newest checkpoint from any other: how far its run was, and an id of its own."""
    newest = self.latest()
    record = {} if newest is None else self._record(newest)
    return {key: record.get(key) for key in ("steps", "tokens", "seconds", "id")}

  def _record(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

  def restore_params(self, step: int, like: Any) -> Any:
    """Returns the parameters of a step, laid out as `like` (shapes with shardings) says."""
    args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
    return self._manager.restore(step, args=args)["params"]

  def restore_state(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the training state of a step, laid out as `like` (shapes with shardings) says; nothing is frozen."""
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(like["params"]), opt=ocp.args.StandardRestore(like["opt"])
    )
    restored = self._manager.restore(step, args=args)
    step_array = jax.device_put(jax.numpy.int32(step), like["step"].sharding)
    return {"params": restored["params"], "frozen": {}, "opt": restored["opt"], "step": step_array}

  def close(self) -> None:
    """Waits until everything is written; without it the save in flight would be lost."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


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
