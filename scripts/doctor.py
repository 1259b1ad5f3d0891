"""Looks at data, tokenizer, mixtures and model before a long run; exits with 1 if there is an error.

Examples:
  argot doctor --config=configs/domain.py:t5-tiny --config.domain=my_domain
  argot doctor --config=configs/domain.py:t5-tiny --config.domain=my_domain --steps=0 --output=findings.json
"""

import json
import sys
import tempfile
from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot doctor`."""
  values = flags.new()
  flags.config(values)
  flags.string(values, "workdir", None, "folder for what a run would make (tokenizer); default: a temporary one")
  flags.string(values, "output", None, "JSON file to write the findings to, too")
  flags.integer(values, "steps", 3, "training steps to time; 0 = none")
  values = flags.parse(values, "doctor", __doc__, arguments, ["config"])
  from train.doctor import examine
  from train.recipe import prepare_jax

  found, counts = [], {"error": 0, "warning": 0, "info": 0}
  with tempfile.TemporaryDirectory(prefix="argot-doctor-") as temporary:
    workdir = Path(values.workdir or temporary)
    workdir.mkdir(parents=True, exist_ok=True)
    with values.config.unlocked():
      if not values.config.data.cache_dir and not values.workdir:
        values.config.data.cache_dir = str(workdir / "cache")  # nothing is left behind
    prepare_jax(values.config)
    for title, findings in examine(values.config, workdir, values.steps, flags.given(values)):
      print(f"\n{title}", flush=True)
      for finding in findings:
        counts[finding.severity] += 1
        found.append({"section": title, **finding._asdict()})
        print(f"  {finding.severity.upper():7}  {finding.where}: {finding.what}")
        if finding.fix:
          print(f"           → {finding.fix}", flush=True)
  print(f"\n{counts['error']} errors, {counts['warning']} warnings")
  if values.output:
    Path(values.output).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  sys.exit(1 if counts["error"] else 0)
