"""What comes from others is data, never code; see SECURITY.md."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from data.prompts import fill, render, template_fields
from data.tasks import Task, load_domain
from models import hf
from models.weights import INDEX, PICKLES, open_tensors
from tests.test_tasks import make
from train import stage

ROOT = Path(__file__).resolve().parent.parent


class Opened:
  """Unpickled, it leaves a file behind."""

  def __init__(self, mark: Path):
    self.mark = mark

  def __reduce__(self):
    return (Path.touch, (self.mark,))


@pytest.mark.parametrize("ending", PICKLES)
def test_pickles_are_refused_by_name_with_advice_and_never_opened(tmp_path, ending):
  name = f"pytorch_model{ending}"
  (tmp_path / name).write_bytes(pickle.dumps(Opened(tmp_path / "ran")))
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  for read in (open_tensors, hf.describe):
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(name)} is not read, since loading it can run code"):
      read(tmp_path)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "x.bin", ""]
)
def test_an_index_reads_its_own_folder_only(tmp_path, name):
  save_file({"w": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
  with pytest.raises(ValueError, match="only safetensors files in the same folder are read"):
    open_tensors(folder)


@pytest.mark.parametrize(
  "template",
  [
    "{input.__class__.__init__.__globals__}",
    "{input[0]}",
    "{input!r}",
    "{input:>999999999}",
    "{input:{target}}",
    "{0}",
    "{}",
    "{ input }",
    "{input",
    "{{{input.x}}}",
  ],
)
def test_a_template_of_a_folder_reaches_nothing(tmp_path, template):
  with pytest.raises(ValueError, match="only plain {field} names are allowed"):
    template_fields(template, "here")
  tasks = {"t": {"kind": "generation", "templates": [{"input": template, "target": "{target}"}]}}
  with pytest.raises(ValueError, match=r"tasks.json: task 't': template .*only plain"):
    load_domain(make(tmp_path, tasks=tasks))


def test_values_with_braces_are_text():
  values = {"input": "{target} {input.__class__} {{x}} {0}", "target": "secret"}
  assert fill("{input}", values) == values["input"]
  assert render(Task("t", "generation", "{input}"), values)[0] == "t: {input}\n" + values["input"]


@pytest.mark.parametrize("name", ["../t", "/t", "a/b", "a\\b", ".", "..", ".t", "-t", "t\n", "t\0", "", "x" * 65, "ü"])
def test_names_that_become_folders_are_checked(tmp_path, name):
  with pytest.raises(ValueError, match="a name is letters"):
    load_domain(make(tmp_path, tasks={name: {"kind": "generation"}}))


def test_a_stored_config_is_data(tmp_path):
  """Strings that look like code, references or YAML tags come back as the strings they are."""
  values = {"seed": 7, "domain": "__import__('os').system('true')", "general": "!!python/object/apply:os.getcwd []"}
  (tmp_path / "config.json").write_text(json.dumps(values))
  config = stage.read_config(tmp_path)
  assert {key: config[key] for key in values} == values
  (tmp_path / "config.json").write_text("import os")
  with pytest.raises(ValueError):
    stage.read_config(tmp_path)


def test_remote_code_is_never_on():
  sources = [
    file.read_text() for folder in ("data", "models", "train", "scripts") for file in (ROOT / folder).glob("*.py")
  ]
  said = [word for text in sources for word in re.findall(r"trust_remote_code\s*=\s*(\w+)", text)]
  assert said and set(said) == {"False"}
  assert not [
    text for text in sources if re.search(r"\b(pickle|dill|marshal)\b\.|allow_pickle\s*=\s*True|(?<!\.)\beval\(", text)
  ]
