"""Exports a model as a Hugging Face folder: config, safetensors, generation config, tokenizer. No torch is needed.

Examples:
  argot export --from=runs/quickstart --to=exported
  argot export --from=runs/quickstart/stages/continued --to=exported --dtype=bfloat16
  argot export --from=runs/adapted --to=adapter --what=adapters

Adapters are merged into their weights; --what=adapters writes them alone, as a PEFT folder for the weights that the
stage started from, with the tasks and their calibration beside them.

The exported tokenizer gives a prompt the ids that the model was trained with: EOS after it, unless a decoder-only model
learned text alone and goes on with it, and for a decoder-only model its start token before it.
"""

from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot export`."""
  values = flags.new()
  flags.string(values, "from", None, "a run's workdir or a stage in it")
  flags.string(values, "to", None, "the new folder")
  flags.string(values, "what", "model", "model or adapters")
  flags.string(values, "dtype", "float32", "of the weights: float32 or bfloat16")
  flags.integer(values, "file_megabytes", 5000, "largest safetensors file; more weights are split over several")
  values = flags.parse(values, "export", __doc__, arguments, ["from", "to"])
  from train.exchange import export_adapters, export_model

  if values.what not in ("model", "adapters"):
    raise ValueError(f"--what={values.what}: known are model and adapters")
  if values.what == "adapters":
    if values["dtype"].present or values["file_megabytes"].present:
      raise ValueError(
        "--dtype and --file_megabytes are of a whole model; leave them out, adapters are float32 in one file"
      )
    export_adapters(values["from"].value, Path(values.to))
    return
  export_model(values["from"].value, Path(values.to), values.dtype, values.file_megabytes * 10**6)
