"""Looks at a model without loading it: family, sizes, every parameter, memory on a mesh.

Examples:
  argot inspect --model=runs/quickstart
  argot inspect --model=llama-2-7b --mesh=fsdp:8 --rows=16 --length=4096
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot inspect`."""
  values = flags.new()
  flags.string(values, "model", None, "a run's workdir, a stage in it, a Hugging Face folder, or hf:NAME")
  flags.string(values, "mesh", "", "devices of each mesh axis, such as data:2,fsdp:8; what is not named is 1")
  flags.integer(values, "rows", 8, "rows of a batch that is served")
  flags.integer(values, "length", 1024, "tokens of each of its rows")
  values = flags.parse(values, "inspect", __doc__, arguments, ["model"])
  from models.sharding import AXES
  from train.exchange import inspect_model

  sizes: dict[str, int] = {}
  for part in filter(None, values.mesh.split(",")):
    axis, _, size = part.partition(":")
    if axis not in AXES or not size.isdigit() or int(size) < 1:
      raise ValueError(f"--mesh={values.mesh}: expected such as data:2,fsdp:8, with axes of {AXES}")
    sizes[axis] = int(size)
  for line in inspect_model(values.model, sizes, values.rows, values.length):
    print(line)
