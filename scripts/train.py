"""Trains one stage: `config.data.mixture` for `config.train.steps`. The same command goes on where it stopped.

Examples:
  argot train --config=configs/pretrain.py:gpt --config.domain=my_domain --workdir=runs/adapted
  argot train --config=configs/pretrain.py:t5 --config.init_from=runs/adapted --workdir=runs/more
  argot train --config=configs/pretrain.py:gpt-init_from --config.init_from=smollm2 --config.domain=… --workdir=…
"""

from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot train`."""
  values = flags.new()
  flags.config(values)
  flags.string(values, "workdir", None, "folder of the stage: checkpoints, log")
  values = flags.parse(values, "train", __doc__, arguments, ["config", "workdir"])
  from train.loop import train
  from train.processes import check_shared
  from train.recipe import load_materials, prepare_jax
  from train.stage import inherit

  workdir = Path(values.workdir)
  prepare_jax(values.config)
  check_shared(workdir)
  config = inherit(values.config)
  train(config, workdir, load_materials(config, workdir), workdir.name)
