"""Runs Argot on TPUs of a GKE cluster, one slice or several: fills gke_jobset.yaml in and applies it.

Needs kubectl and, in the cluster, the JobSet operator, node pools of the topology, an image that has Argot with the
extra `tpu` installed in its working directory, and a volume claim that many nodes may write (ReadWriteMany).

Example:
  python -m scripts.launch.gke --name=mine --accelerator=tpu-v5-lite-podslice --topology=4x4 --slices=2 \\
    --image=REGION-docker.pkg.dev/PROJECT/argot/argot:1 --claim=shared -- \\
    train --config=configs/pretrain.py:gpt-gpt2 --config.data.batch_size=256 --config.domain=/shared/my_domain \\
    --workdir=/shared/runs/mine
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from types import SimpleNamespace

from scripts import flags

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")


def manifest(values: SimpleNamespace) -> str:
  """Returns the filled-in manifest.

  Args:
    values: from `parse`.

  Raises:
    ValueError: a topology whose chips do not fill hosts, a number out of range, or a name that Kubernetes refuses.
  """
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", values.topology):
    raise ValueError(f"--topology={values.topology}: expected sides such as 4x4 (v5e, v6e) or 2x2x4 (v4, v5p)")
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
    raise ValueError(f"--name={values.name}: expected at most 40 of a-z, 0-9 and -, a letter first")
  for name, least in {"chips-per-host": 1, "slices": 1, "restarts": 0}.items():
    if (given := getattr(values, name.replace("-", "_"))) < least:
      raise ValueError(f"--{name}={given}: expected {least} or more")
  chips = math.prod(int(side) for side in values.topology.split("x"))
  if chips % values.chips_per_host:
    raise ValueError(f"--topology={values.topology} has {chips} chips: no multiple of {values.chips_per_host} a host")
  selector = {
    "cloud.google.com/gke-tpu-accelerator": values.accelerator,
    "cloud.google.com/gke-tpu-topology": values.topology,
  }
  if values.spot:
    selector["cloud.google.com/gke-spot"] = "true"
  filled = {"name": values.name, "slices": values.slices, "hosts": chips // values.chips_per_host}
  filled |= {"restarts": values.restarts, "chips": values.chips_per_host}
  # Kubernetes puts variables in the place of $(NAME) in a command; $$ is one $.
  command = ["python", "-m", "scripts", *(word.replace("$", "$$") for word in values.argot)]
  texts = {"image": values.image, "claim": values.claim, "folder": values.folder, "cache": f"{values.folder}/cache"}
  # As JSON, which YAML reads, but for its pairs of escapes for a character such as an emoji.
  texts |= {"selector": selector, "command": command}
  filled |= {name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()}
  return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(filled)


def parse(arguments: Sequence[str]) -> SimpleNamespace:
  """Parses the command line: flags by name, and `argot`, what stands after `--`."""
  own, argot = list(arguments), []
  if "--" in own:
    own, argot = own[: own.index("--")], own[own.index("--") + 1 :]
  values = flags.new()
  flags.string(values, "name", None, "of the JobSet")
  flags.string(values, "accelerator", None, "node label, such as tpu-v5-lite-podslice, tpu-v6e-slice")
  flags.string(values, "topology", None, "of a slice, such as 4x4")
  flags.integer(values, "chips-per-host", 4, "chips of a host")
  flags.integer(values, "slices", 1, "slices")
  flags.string(values, "image", None, "container image")
  flags.string(values, "claim", None, "PersistentVolumeClaim, ReadWriteMany")
  flags.string(values, "folder", "/shared", "where it is mounted; --workdir lies there")
  flags.integer(values, "restarts", 100, "of all pods, after preemptions and failures")
  flags.boolean(values, "spot", "on spot nodes")
  flags.boolean(values, "dry-run", "print what would be done")
  required = ["name", "accelerator", "topology", "image", "claim"]
  flags.parse(values, "launch (gke)", __doc__, own, required)
  if not argot:
    sys.exit("gke.py: what to run stands after --, such as -- train --config=…")
  return SimpleNamespace(**{name.replace("-", "_"): values[name].value for name in values}, argot=argot)


def main(arguments: Sequence[str]) -> None:
  """Applies the JobSet, and says how to follow it."""
  values = parse(arguments)
  try:
    text = manifest(values)
  except ValueError as error:
    sys.exit(f"gke.py: {error}")
  apply = ["kubectl", "apply", "-f", "-"]
  if values.dry_run:
    print(f"# {' '.join(apply)}\n{text}", end="")
  else:
    subprocess.run(apply, input=text, text=True, check=True)
  first = f"jobset.sigs.k8s.io/jobset-name={values.name},jobset.sigs.k8s.io/job-index=0"
  first += ",batch.kubernetes.io/job-completion-index=0"
  print(f"# kubectl logs -f -l {first}\n# kubectl delete jobset {values.name}")


if __name__ == "__main__":
  main(sys.argv[1:])
