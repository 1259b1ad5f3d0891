"""Runs Argot on TPUs of a GKE cluster, one slice or several: fills gke_jobset.yaml in and applies it.

Needs kubectl and, in the cluster, the JobSet operator, node pools of the topology, an image that has Argot with the
extra `tpu` installed in its working directory, and a volume claim that many nodes may write (ReadWriteMany).

Example:
  python scripts/launch/gke.py --name=mine --accelerator=tpu-v5-lite-podslice --topology=4x4 --slices=2 \\
    --image=REGION-docker.pkg.dev/PROJECT/argot/argot:1 --claim=shared -- \\
    train --config=configs/pretrain.py:gpt-small --config.domain=/shared/my_domain --workdir=/shared/runs/mine
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")


def manifest(values: argparse.Namespace) -> str:
  """Returns the filled-in manifest.

  Args:
    values: from `parse`.

  Raises:
    ValueError: a topology whose chips do not fill hosts, or a name that Kubernetes refuses.
  """
  if not re.fullmatch(r"\d+x\d+(x\d+)?", values.topology):
    raise ValueError(f"--topology={values.topology}: expected sides such as 4x4 (v5e, v6e) or 2x2x4 (v4, v5p)")
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
    raise ValueError(f"--name={values.name}: expected at most 40 of a-z, 0-9 and -, a letter first")
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
  filled |= {"restarts": values.restarts, "chips": values.chips_per_host, "folder": values.folder}
  filled |= {"image": json.dumps(values.image), "claim": json.dumps(values.claim)}
  filled |= {"selector": json.dumps(selector), "command": json.dumps(["python", "-m", "scripts", *values.argot])}
  return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(filled)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--accelerator", required=True, help="node label, such as tpu-v5-lite-podslice, tpu-v6e-slice")
  parser.add_argument("--topology", required=True, help="of a slice, such as 4x4")
  parser.add_argument("--chips-per-host", type=int, default=4)
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--image", required=True)
  parser.add_argument("--claim", required=True, help="PersistentVolumeClaim, ReadWriteMany")
  parser.add_argument("--folder", default="/shared", help="where it is mounted; --workdir lies there")
  parser.add_argument("--restarts", type=int, default=100, help="of all pods, after preemptions and failures")
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--dry-run", action="store_true", help="print what would be done")
  parser.add_argument("argot", nargs="+", metavar="-- VERB …", help="argot's verb and flags")
  return parser.parse_args(arguments)


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
