"""Whatever a user's files hold, the readers end with a clear error or with rows: hypothesis looks for what does not.

Short here; `-m slow` runs each for longer.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from configs import base
from data.files import SUFFIXES
from data.prompts import fill, template_fields
from data.sources import open_rows
from data.tasks import Task, load_domain
from models import hf
from models.families import FAMILIES
from models.weights import INDEX, SINGLE, open_tensors
from scripts import __main__ as command
from train import stage

CLEAR = (ValueError, FileNotFoundError)  # what `argot` makes one line of
QUICK = settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=20_000)
LONG = settings(max_examples=1500, suppress_health_check=list(HealthCheck), deadline=20_000)
TEXT = st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def longer(test):
  """Returns the same test with more examples, marked slow."""
  return pytest.mark.slow(LONG(test))


def clearly(action, *arguments):
  """Does something that may end with a clear error, and with no other; returns what it gave."""
  try:
    return action(*arguments)
  except CLEAR as error:
    assert str(error).strip()
    return None


def of_keys(names, values=VALUES):
  """Objects that have some of the right names, with whatever values."""
  return st.dictionaries(st.sampled_from(names) | TEXT, values, max_size=len(names))


# The domain folder.

FIELDS = ("kind", "instruction", "labels", "templates", "chat", "label_score", "metrics", "train", "test", "files")
ALMOST = st.fixed_dictionaries(
  {"kind": st.sampled_from(["classification", "generation"])},
  optional={
    "labels": VALUES | st.just(["a", "b"]),
    "templates": VALUES | st.lists(of_keys(("input", "target"), TEXT), max_size=2),
    "metrics": VALUES,
    "chat": VALUES,
    "train": VALUES | of_keys(("path", "split", "fields", "config", "data_dir")),
    "files": VALUES,
  },
)
ROWS = st.lists(
  (of_keys(("input", "target", "text")) | VALUES).map(lambda row: json.dumps(row).encode())
  | st.binary(max_size=20)
  | st.just(b'{"input": "x", "target": "a"}'),
  max_size=4,
).map(b"\n".join)


def read_domain(folder: Path, parts: dict[str, bytes]):
  for name, content in parts.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  domain = load_domain(folder)
  return list(domain.corpus), list(domain.corpus_test), domain.tasks


GOOD = {
  "corpus.jsonl": b'{"text": "a note"}\n' * 3,
  "tasks.json": b'{"t": {"kind": "classification", "labels": ["a", "b"]}}',
  "t/train.jsonl": b'{"input": "x", "target": "a"}\n',
  "t/test.jsonl": b'{"input": "x", "target": "a"}\n',
}


def check_domain(folder_of, name, content):
  read = clearly(read_domain, folder_of(), GOOD | {name: content})
  if read:
    corpus, held_out, tasks = read
    assert all(isinstance(text, str) and text.strip() for text in corpus + held_out)
    for task in tasks.values():
      assert all(Path(str(file)).name == str(file) or isinstance(file, (str, dict)) for file in task.files.values())


@pytest.fixture
def folder_of(tmp_path):
  """Makes empty folders."""
  count = iter(range(10**9))

  def make() -> Path:
    folder = tmp_path / str(next(count))
    folder.mkdir()
    return folder

  return make


CONTENTS = {
  "rows of a task": ("t/train.jsonl", ROWS),
  "rows of the corpus": ("corpus.jsonl", ROWS),
  "tasks.json, bytes": ("tasks.json", st.binary(max_size=40)),
  "tasks.json, JSON": ("tasks.json", VALUES.map(lambda value: json.dumps(value).encode())),
  "tasks.json, fields": (
    "tasks.json",
    st.dictionaries(st.just("t") | TEXT, of_keys(FIELDS) | ALMOST, max_size=2).map(
      lambda value: json.dumps(value).encode()
    ),
  ),
}


@pytest.mark.parametrize("part", CONTENTS)
@QUICK
@given(data=st.data())
def test_a_domain_folder(folder_of, part, data):
  name, contents = CONTENTS[part]
  check_domain(folder_of, name, data.draw(contents))


@pytest.mark.parametrize("part", CONTENTS)
@longer
@given(data=st.data())
def test_a_domain_folder_longer(folder_of, part, data):
  name, contents = CONTENTS[part]
  check_domain(folder_of, name, data.draw(contents))


def check_file(folder_of, suffix, content):
  folder = folder_of()
  (folder / f"data{suffix}").write_bytes(content)

  def read():
    rows = open_rows(str(folder / f"data{suffix}"), folder / "cache")
    return [rows.read(number) for number in range(len(rows))]

  clearly(read)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(QUICK, max_examples=10)
@given(content=st.binary(max_size=60))
def test_a_file_of_any_form(folder_of, suffix, content):
  check_file(folder_of, suffix, content)


@pytest.mark.parametrize("suffix", SUFFIXES)
@longer
@given(content=st.binary(max_size=200))
def test_a_file_of_any_form_longer(folder_of, suffix, content):
  check_file(folder_of, suffix, content)


def check_source(source, folder):
  paths = [str(folder / "data.jsonl"), str(folder), str(folder / "*.jsonl")]
  (folder / "data.jsonl").write_text('{"text": "x", "a": {"b": "y"}}\n')
  if isinstance(source, dict) and isinstance(source.get("path"), int):
    source["path"] = paths[source["path"] % 3]
  if str(source["path"] if isinstance(source, dict) and "path" in source else source).startswith(("hf:", "tfds:")):
    return
  rows = clearly(open_rows, source, folder / "cache")
  if rows is not None:
    clearly(lambda: [rows.read(number) for number in range(len(rows))])


SOURCES = TEXT | of_keys(("path", "split", "fields", "config", "data_dir")).map(lambda s: {"path": 0} | s)


@QUICK
@given(source=SOURCES)
def test_a_source(folder_of, source):
  check_source(source, folder_of())


@longer
@given(source=SOURCES)
def test_a_source_longer(folder_of, source):
  check_source(source, folder_of())


# Templates.

PIECES = st.sampled_from(["{", "}", "{{", "}}", "{input}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "x"])


def check_template(template, value):
  fields = clearly(template_fields, template, "here")
  if fields is not None:
    filled = fill(template, dict.fromkeys(fields, value))
    literal = fill(template, dict.fromkeys(fields, ""))
    assert len(filled) == len(literal) + len(value) * len(fields)  # each value once, as it is


@QUICK
@given(
  template=st.lists(PIECES | TEXT, max_size=6).map("".join) | VALUES, value=st.lists(PIECES, max_size=3).map("".join)
)
def test_a_template(template, value):
  check_template(template, value)


@longer
@given(
  template=st.lists(PIECES | TEXT, max_size=6).map("".join) | VALUES, value=st.lists(PIECES, max_size=3).map("".join)
)
def test_a_template_longer(template, value):
  check_template(template, value)


@QUICK
@given(name=TEXT | st.sampled_from(["../x", "/etc", ".", "..", "a/b", "a\\b", "a\0", "a\n", "-x", "tasks"]))
def test_a_name_stays_in_its_folder(name):
  task = clearly(Task.from_dict, name, {"kind": "generation"})
  if task is not None:
    assert Path(name).name == name and name not in (".", "..") and "\0" not in name and not name.startswith("-")


# Settings.

KEYS = sorted(stage.flat(base.get_config().to_dict()))


def check_override(key, value):
  """A flag is refused with one line, or the config is as before but for that key, and still locked."""
  seen = []

  def verb(arguments):
    from scripts import flags

    values = flags.new()
    flags.config(values)
    values = flags.parse(values, "train", "Examples", arguments, ["config"])
    seen.append(values.config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(command.VERBS, "train", verb)
    config = Path(base.__file__)
    patch.setattr(sys, "argv", ["argot", "train", f"--config={config}", f"--config.{key}={value}"])
    try:
      command.main()
    except SystemExit as ended:
      assert isinstance(ended.code, str) and ended.code.startswith("argot train: ")
  assert all(config.is_locked for config in seen)


@QUICK
@given(key=st.sampled_from(KEYS) | TEXT, value=SCALARS.map(str))
def test_a_setting(key, value):
  check_override(key, value)


@longer
@given(key=st.sampled_from(KEYS) | TEXT, value=VALUES.map(str))
def test_a_setting_longer(key, value):
  check_override(key, value)


# Weights in Hugging Face's form.

WEIGHTS = save({"wte.weight": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(2, np.float32)})
HEADERS = of_keys(
  ("wte.weight", "b", "__metadata__"),
  VALUES | of_keys(("dtype", "shape", "data_offsets"), VALUES | st.sampled_from(["F32", [2], [0, 8]])),
)


@st.composite
def damaged(draw) -> bytes:
  """A safetensors file with bytes changed, cut, or with another header."""
  content = bytearray(WEIGHTS)
  if draw(st.booleans()):
    header = json.dumps(draw(HEADERS)).encode()
    return len(header).to_bytes(8, "little") + header + content[-56:]
  for _ in range(draw(st.integers(0, 4))):
    content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
  return bytes(content[: draw(st.integers(0, len(content)))])


def check_weights(folder, content, index):
  (folder / SINGLE).write_bytes(content)
  if index is not None:
    (folder / INDEX).write_bytes(index)
  tensors = clearly(open_tensors, folder) or {}
  for tensor in tensors.values():
    assert tensor.file.parent == folder  # no path out of the folder
    if len(tensor.shape) > 0 and tensor.dtype in ("float32", "bfloat16"):
      clearly(lambda tensor=tensor: tensor.rows(0, tensor.shape[0]))


INDEXES = st.none() | st.binary(max_size=30) | (
  VALUES | st.dictionaries(st.just("weight_map"), VALUES | of_keys(("wte.weight", "b"), VALUES | st.just(SINGLE) |
  st.sampled_from(["../model.safetensors", "/etc/passwd", "..", "x/../../y.safetensors"])))
).map(lambda value: json.dumps(value).encode())  # fmt: skip


@QUICK
@given(content=damaged(), index=INDEXES)
def test_weights(folder_of, content, index):
  check_weights(folder_of(), content, index)


@longer
@given(content=damaged(), index=INDEXES)
def test_weights_longer(folder_of, content, index):
  check_weights(folder_of(), content, index)


NUMBERS = (
  "n_embd",
  "n_head",
  "hidden_size",
  "num_attention_heads",
  "num_hidden_layers",
  "vocab_size",
  "d_model",
  "n_layer",
)
CONFIGS = (
  VALUES
  | st.fixed_dictionaries({"model_type": st.sampled_from(sorted(FAMILIES)) | VALUES})
  | st.builds(
    lambda kind, rest: {"model_type": kind} | rest,
    st.sampled_from(sorted(FAMILIES)),
    of_keys((*NUMBERS, "tie_word_embeddings", "rope_scaling", "auto_map", "torch_dtype", "hidden_act")),
  )
)


def check_config(folder, value):
  (folder / "config.json").write_text(json.dumps(value))
  (folder / SINGLE).write_bytes(WEIGHTS)
  if clearly(hf.is_model, folder):
    clearly(hf.describe, folder)
  clearly(stage.find, folder)


@settings(QUICK, max_examples=15)
@example(value={"model_type": "gemma", "torch_dtype": []})
@given(value=CONFIGS)
def test_a_config_of_weights(folder_of, value):
  check_config(folder_of(), value)


@longer
@given(value=CONFIGS)
def test_a_config_of_weights_longer(folder_of, value):
  check_config(folder_of(), value)


def test_nothing_was_imported_from_a_config(tmp_path):
  """`auto_map` names code beside the weights; it is not run."""
  (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
  value = {"model_type": "gpt2", "auto_map": {"AutoConfig": "evil.Config"}}
  check_config(tmp_path, value)
  check_config(tmp_path, {**value, "model_type": "evil"})
  assert not (tmp_path / "ran").exists() and os.path.exists(tmp_path / "evil.py")
