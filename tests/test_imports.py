"""The house's arrows: who may import whom, and that every config builds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base, domain, pretrain, quickstart

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "data", "models", "train", "scripts")
MAY = {
  "configs": {"configs"},
  "data": {"data"},
  "models": {"models"},
  "train": {"configs", "data", "models", "train"},
  "scripts": set(FOLDERS),
}
FORBIDDEN = {"configs": {"jax", "flax", "numpy"}, "data": {"jax", "flax", "torch"}}
ONLY = {"orbax": "train/checkpoint.py", "absl": "scripts/flags.py", "argparse": None, "torch": "scripts/peers.py"}
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def imported(file: Path) -> set[str]:
  """Names of top-level packages that a file imports."""
  nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
  names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
  names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
  return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file):
  folder, found = file.relative_to(ROOT).parts[0], imported(file)
  assert found & set(FOLDERS) <= MAY[folder]
  assert not found & FORBIDDEN.get(folder, set())
  for package, place in ONLY.items():
    assert package not in found or str(file.relative_to(ROOT)) == place


def test_nnx_is_split_and_merged_in_one_file():
  users = [
    file.name for file in FILES if any(f"nnx.{word}" in file.read_text() for word in ("split(", "merge(", "jit"))
  ]
  assert users == ["module.py"]


def test_what_a_step_needs_takes_no_pytorch_with_it():
  check = "import sys; import train.loop; print(sorted({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_there_is_no_utils():
  assert not [file for file in FILES if file.stem in ("utils", "util", "helpers")]


@pytest.mark.parametrize("make", [base.get_config, quickstart.get_config, domain.get_config, pretrain.get_config])
def test_configs_are_locked_and_whole(make):
  config = make()
  assert config.is_locked and set(config) == set(base.get_config())
  with pytest.raises((AttributeError, KeyError), match="learning_rate"):
    config.optimizer.learnin_rate = 1.0


@pytest.mark.parametrize("arg", ["", "bert-tiny", "t5"])
def test_bad_config_arguments_say_what_is_known(arg):
  with pytest.raises(ValueError, match="t5"):
    domain.get_config(arg)
