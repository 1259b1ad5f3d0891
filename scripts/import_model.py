"""Imports weights in Hugging Face's form (safetensors) as a stage, which every verb takes as it takes its own.

Examples:
  argot import --from=flan-t5-small --to=runs/flan
  argot import --from=hf:HuggingFaceTB/SmolLM2-135M --to=runs/smollm2
  argot import --from=flan-t5-small --adapters=adapter --to=runs/adapted

A config's init_from takes the folder directly, too: argot recipe --config=configs/domain.py:t5-init_from
--config.init_from=flan-t5-small --config.domain=my_domain --workdir=runs/mine
"""

from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot import`."""
  values = flags.new()
  flags.string(values, "from", None, "a folder with config.json and safetensors, or hf:NAME of the hub")
  flags.string(values, "adapters", "", "a PEFT folder of adapters for these weights, to be merged into them")
  flags.string(values, "to", None, "folder of the new stage")
  values = flags.parse(values, "import", __doc__, arguments, ["from", "to"])
  from train.exchange import import_model

  import_model(values["from"].value, Path(values.to), values.adapters)
