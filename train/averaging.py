"""Averages of two stages' parameters: a stage like others, that nothing trained.

Reference:
  Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, 2022), section 3: `(1 - share) · earlier + share ·
  later`, parameter by parameter.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from models.sharding import make_mesh
from train import stage
from train.arms import Stage
from train.checkpoint import Checkpoints
from train.loop import Run, build_model
from train.stage import Materials


def average(earlier: Any, later: Any, share: float) -> Any:
  """Averages two trees of parameters.

  Args:
    earlier, later: of the same form; sums are made in float32.
    share: of `later`, 0 to 1.

  Returns:
    A tree with the leaves' own types.

  Example:
    >>> average({"w": jnp.float32(1.0)}, {"w": jnp.float32(5.0)}, 0.25)["w"].item()
    2.0
  """

  def mix(a: jax.Array, b: jax.Array) -> jax.Array:
    return ((1 - share) * a.astype(jnp.float32) + share * b.astype(jnp.float32)).astype(a.dtype)

  return jax.tree.map(mix, earlier, later)


def average_stages(config: ConfigDict, folder: Path, planned: Stage, materials: Materials) -> Run:
  """Makes an averaged arm, or makes it again: its folder has one checkpoint, of step 0.

  Args:
    config: of the arm, from `stage_config`.
    folder: of the arm; the two stages lie beside it.
    planned: which stages, and the share.
    materials: for the tokenizer and the tasks.

  Raises:
    ValueError: the folder holds an average of other stages, or of what they were before they were trained again.
  """
  stage.check_description(folder, config, materials)
  mesh, model, began = make_mesh(config.mesh), build_model(config, materials.tokenizer), time.monotonic()
  sources = [folder.parent / name for name in (planned.average_with, planned.init_from)]
  of = {"with": planned.average_with, "share": planned.share}
  made_of = {**of, "from": [stage.identity(source) for source in sources]}
  with jax.set_mesh(mesh), Checkpoints(folder, writes=True) as checkpoints:
    newest = checkpoints.latest()
    then = None if newest is None else checkpoints.restore_run(newest).get("averaged")
    if newest is not None and then != made_of:
      raise ValueError(f"{folder} holds an average of {then}, and {made_of} is asked for now; delete that folder")
    earlier, later = (stage.load_params(source, model, mesh) for source in sources)
    params = jax.jit(partial(average, share=planned.share), donate_argnums=0)(earlier, later)
    record = {"steps": 0, "tokens": 0, "seconds": time.monotonic() - began, "counts": {}, "averaged": made_of}
    stage.write_description(folder, config, materials)
    if newest is None:
      checkpoints.save(0, {"params": params}, record)
  print(f"{planned.name}: {1 - planned.share:g} of {planned.average_with}, {planned.share:g} of {planned.init_from}")
  return Run(model, params, mesh, record)
