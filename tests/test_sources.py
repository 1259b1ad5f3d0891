"""Sources: rows of every form come back whole and in any order; a bad one is named by its place, or counted."""

import csv
import errno
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.base import get_config
from data import files
from data.cache import cache_folder, tokenised
from data.pipeline import build_stream
from data.rows import BadRow, Chosen, Joined, Listed, content_digest, hash_of
from data.sources import files_of, open_rows, open_texts, texts_of
from data.tasks import Domain, Task, read_task_rows
from data.tokenizer import byte_tokenizer
from train.recipe import write_scores

ROOT = Path(__file__).parent.parent


def read_texts(source):
  return list(open_texts(source, cache_folder("")))


def lines(*rows) -> bytes:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "b.jsonl").write_bytes(lines({"text": "one\n\ntwo"}, {"text": "drei ü", "id": 5}))
  (tmp_path / "a.txt").write_bytes(b"first\nstill first\r\n \n\nsecond\n")
  (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines({"text": "zipped"})))
  (tmp_path / "notes.md").write_text("not text of the corpus")
  (tmp_path / "._b.jsonl").write_bytes(b"\x00\x05\x16\x07")  # macOS leaves such beside a file on other disks
  return tmp_path


def test_jsonl(folder):
  assert read_texts(folder / "b.jsonl") == ["one\n\ntwo", "drei ü"]


def test_blank_lines_part_the_documents_of_a_txt(folder):
  assert read_texts(folder / "a.txt") == ["first\nstill first", "second"]


def test_folders_and_globs_are_read_in_order_of_names(folder):
  everything = ["first\nstill first", "second", "one\n\ntwo", "drei ü", "zipped"]
  assert read_texts(folder) == everything
  assert read_texts(folder / "*.jsonl*") == everything[2:]
  assert [file.name for file in files_of(folder)] == ["a.txt", "b.jsonl", "c.jsonl.gz"]


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "a"}) + b"\n \n" + lines({"text": "b"}))
  rows = open_rows(tmp_path / "x.jsonl", tmp_path)
  assert [(rows.where(i)[-2:], row["text"]) for i, row in enumerate(rows)] == [(":1", "a"), (":4", "b")]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (b'{"text": "cut', "not a line of JSON"),
    (b'["text"]', "expected an object"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"body": "x"}', "field 'text' must be a non-empty string, got nothing; fields: .'body'"),
    (b'{"text": " "}', "non-empty string"),
    (b'{"text": 7}', "got 7"),
    (b'{"text": null}', "non-empty string"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b"[" * 100_000, "not a line of JSON"),
  ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
  file = tmp_path / "x.jsonl"
  file.write_bytes(lines(*[{"text": "fine " * 50}] * 1000) + bad + b"\n" + lines({"text": "after"}))
  with pytest.raises(ValueError, match=message) as error:
    read_texts(file)
  assert f"{file}:1001:" in str(error.value)


def test_a_bad_byte_in_plain_text_is_named(tmp_path):
  (tmp_path / "x.txt").write_bytes(b"fine\n\nfine\n\xff\n")
  with pytest.raises(ValueError, match=r"x\.txt:4: not UTF-8"):
    read_texts(tmp_path / "x.txt")


def test_a_damaged_archive_is_named(tmp_path):
  (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines({"text": "a"}))[:-9])
  with pytest.raises(ValueError, match=r"x\.jsonl\.gz: the compressed file is damaged"):
    read_texts(tmp_path / "x.jsonl.gz")


def test_other_forms_and_nothing_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match=r"notes\.md: expected a file that ends in \.jsonl"):
    read_texts(folder / "notes.md")
  with pytest.raises(FileNotFoundError, match="expected a file, folder or glob"):
    read_texts(tmp_path / "absent.jsonl")
  (tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="holds no documents"):
    read_texts(tmp_path / "empty.jsonl")


ROWS = [{"text": f'note {i}, "quoted"\nsecond line ü', "label": "NA" if i % 3 else "null"} for i in range(23)]


def write(path, rows=ROWS):
  """Writes rows in the form that the name asks for."""
  name = path.name
  if ".jsonl" in name:
    content = lines(*rows)
  elif ".parquet" in name:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path
  else:
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, rows[0], delimiter="," if ".csv" in name else "\t")
    table.writeheader()
    table.writerows(rows)
    content = stream.getvalue().encode()
  if name.endswith(".zst"):
    import pyarrow

    content = pyarrow.compress(content, codec="zstd", asbytes=True)
  path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  return path


FORMS = [s for s in files.SUFFIXES if ".txt" not in s]


@pytest.mark.parametrize("suffix", FORMS)
def test_every_form_gives_the_same_rows_in_any_order(tmp_path, suffix):
  rows = open_rows(write(tmp_path / f"rows{suffix}"), tmp_path / "cache")
  assert len(rows) == 23 and list(rows) == ROWS
  for number in np.random.default_rng(0).permutation(23):
    assert rows[number] == ROWS[number]
  assert rows[5:8] == ROWS[5:8]
  with pytest.raises(IndexError):
    rows[23]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz", ".parquet"])
def test_a_digest_is_of_the_content(tmp_path, suffix):
  def digest(rows):
    return open_rows(write(tmp_path / f"rows{suffix}", rows), tmp_path / "cache").digest()

  assert digest(ROWS) == digest(ROWS) != digest(ROWS[1:])
  assert digest([*ROWS[:-1], {**ROWS[-1], "label": "x"}]) != digest(ROWS)


def test_a_row_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
  rows = open_rows(write(tmp_path / "rows.jsonl"), tmp_path)
  parsed = []
  monkeypatch.setattr(files.json, "loads", lambda text: parsed.append(text) or {})
  rows[17]
  assert len(parsed) == 1 and "note 17" in parsed[0]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives_jsonl_and_csv(tmp_path_factory, texts):
  folder = tmp_path_factory.mktemp("any")
  rows = [{"text": text, "n": str(i)} for i, text in enumerate(texts)]
  assert list(open_rows(write(folder / "a.jsonl", rows), folder)) == rows
  if not any("\0" in text for text in texts):  # the csv module reads no NUL
    assert list(open_rows(write(folder / "a.csv", rows), folder)) == rows


@given(data=st.data(), sizes=st.lists(st.integers(0, 5), max_size=5))
def test_joined_and_chosen_rows_are_those_of_lists(data, sizes):
  whole = [{"n": n} for n in range(sum(sizes))]
  ends = np.cumsum([0, *sizes])
  joined = Joined([Listed(whole[a:b]) for a, b in zip(ends, ends[1:], strict=False)])
  assert list(joined) == whole
  numbers = data.draw(st.lists(st.integers(0, len(whole) - 1))) if whole else []
  chosen = Chosen(joined, numbers)
  assert list(chosen) == [whole[n] for n in numbers] and len(chosen) == len(numbers)


def test_fields_are_mapped_and_paths_followed(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(lines({"note": {"body": "deep"}, "a.b": "dotted"}, {"note": {}}))
  rows = open_rows({"path": str(tmp_path / "x.jsonl"), "fields": {"text": "note.body", "input": "a.b"}}, tmp_path)
  assert rows[0]["text"] == "deep" and rows[0]["input"] == "dotted"
  with pytest.raises(BadRow, match=r"x.jsonl:2: the row has no field 'note.body'.*'note'"):
    rows[1]


@pytest.mark.parametrize(
  ("split", "expected"),
  [("", range(20)), ("train", range(20)), ("train[:10%]", [0, 1]), ("train[15:]", range(15, 20))]
  + [("train[-2:]+train[:1]", [18, 19, 0]), ("train[50%:60%]", [10, 11])],
)
def test_split_syntax(tmp_path, split, expected):
  rows = [{"text": str(i)} for i in range(20)]
  write(tmp_path / "x.jsonl", rows)
  found = open_rows({"path": str(tmp_path / "x.jsonl"), "split": split}, tmp_path)
  assert [int(row["text"]) for row in found] == list(expected)


def test_what_validation_is_called_is_not_trained_on(tmp_path):
  for name in ("train-0", "val", "Test", "testing", "eval_2", "notes"):
    (tmp_path / f"{name}.txt").write_text(name)
  found = {
    split: [row["text"] for row in open_rows({"path": str(tmp_path), "split": split}, tmp_path)]
    for split in ("train", "validation", "test")
  }
  assert found == {"train": ["notes", "train-0"], "validation": ["eval_2", "val"], "test": ["Test", "testing"]}


def test_files_of_a_folder_are_splits_by_name(tmp_path):
  for name in ("train-00000.parquet", "train-00001.parquet", "test-00000.parquet"):
    write(tmp_path / name, [{"text": name}])
  assert read_texts({"path": str(tmp_path), "split": "test"}) == ["test-00000.parquet"]
  assert read_texts({"path": str(tmp_path), "split": "train"}) == ["train-00000.parquet", "train-00001.parquet"]
  with pytest.raises(ValueError, match="has the splits .'test', 'train'.; say which"):
    read_texts(str(tmp_path))
  with pytest.raises(ValueError, match="no split 'validation'"):
    read_texts({"path": str(tmp_path), "split": "validation"})


@pytest.mark.parametrize(
  ("source", "message"),
  [({"path": "x", "spilt": "train"}, "unknown .'spilt'.*known are"), ({"split": "train"}, "needs `path`")]
  + [
    ({"path": "FILE", "split": "train[x"}, "cannot be read.*train.:90%"),
    ({"path": ""}, "needs `path`"),
    ([None, ["x" * 300]], "needs `path`"),
  ],
)
def test_a_source_that_cannot_be_is_refused(tmp_path, source, message):
  write(tmp_path / "x.jsonl")
  if isinstance(source, dict) and source.get("path") == "FILE":
    source = {**source, "path": str(tmp_path / "x.jsonl")}
  with pytest.raises(ValueError, match=message):
    open_rows(source, tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"a,b\n1,2\n1,2,3\n", r"x.csv:3: not one cell a column, got 3"),
    (b"a,a\n1,2\n", "each once"),
    (b"", "must name the columns"),
    (b'a,b\n1,2\n1,"open\n3,4\n', r"x.csv:3: not a line of a table"),
    (b"a,b\n1,\xff\n", r"x.csv:2: not UTF-8"),
  ],
)
def test_a_bad_table_is_named(tmp_path, content, message):
  (tmp_path / "x.csv").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(open_rows(tmp_path / "x.csv", tmp_path))


def table_of(path, changed, count=1000):
  """Writes a table of rows without a quote, but for those that are changed (by number, from 1)."""
  cells = "clause {0}\tkeep" if path.suffix == ".tsv" else "clause {0},keep"
  rows = [changed.get(number, cells.format(number)) for number in range(1, count + 1)]
  path.write_text("\n".join([cells.replace("clause {0}", "input").replace("keep", "target"), *rows]) + "\n")
  return path


@pytest.mark.parametrize(
  ("name", "changed", "bad"),
  [
    ("x.csv", {10: '"Lessor means the owner,yes'}, [10]),  # never closed
    ("x.csv", {10: '"Lessor means the owner,yes', 1000: "a,b,c"}, [10, 1000]),
    ("x.csv", {10: '"Lessor means,yes', 500: 'the "owner" is,no'}, [10]),  # text after the quote that closes
    ("x.csv", {10: '"Lessor means,yes', 500: 'clause 500,"no"'}, [10]),
    ("x.csv", {10: '"Lessor means,yes', 500: 'clause,no"'}, [10]),  # closed in another column
    ("x.csv", {10: '"Lessor means,yes', 500: 'clause",no'}, [10]),  # well-formed: one row of 491 lines
    ("x.tsv", {10: '"Lessor means\tyes', 500: 'clause"\tno'}, [10]),
    ("x.tsv", {10: '"Lessor means\tyes', 11: 'clause"\tno', 13: '"a\tb', 900: "\t"}, [10, 13]),
  ],
)
def test_a_stray_quote_costs_its_own_row_alone(tmp_path, name, changed, bad):
  file = table_of(tmp_path / name, changed)
  task = Task("t", "generation", "", files={"train": str(file)}, bad_rows="skip")
  rows = open_rows(file, tmp_path)
  assert len(rows) == 1000 and rows.where(998).endswith(":1000")
  for number in bad:
    with pytest.raises(BadRow, match=f"{name}:{number + 1}: not "):
      rows[number - 1]
  good = [number for number in range(1, 1001) if number not in bad and changed.get(number) != "\t"]
  used = read_task_rows(task, "train")
  assert len(used) == len(good) and sum(used.skipped.values()) == 1000 - len(good)
  assert [row["input"] for row, number in zip(used, good, strict=True) if number not in changed] == [
    f"clause {number}" for number in good if number not in changed
  ]


def test_what_a_stray_quote_hid_is_other_content(tmp_path):
  for name, changed in (("x.csv", {}), ("x.csv", {10: '"open,yes'})):
    file = table_of(tmp_path / name, changed)
    assert (files.open_file(file, tmp_path).digest() == hash_of("Table", content_digest(file))) == (not changed)


CELLS = [
  ["Dear sir, I am ill.\nThank you, yours,\nA, B", "urgent"],
  ["Medication:\nAspirin, 81 mg\nLisinopril, 10 mg\nIron, 5 mg\nZinc, 2 mg", "a, b"],
  ["one\n\n\ntwo\n", "x\ny"],
  ["a,b\nc,d\ne,f\ng,h\ni,j\nk,l", "a table, in a cell"],
  ["first\tsecond\nthird\tfourth", "in\ttabs"],
  ['"quoted"\n"again", he said\n""', '"'],
  ["costs 1,000 a year\nor more", "no"],
]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("names", [["text"], ["text", "label"], ["label", "text"], ["id", "text", "label"]])
def test_cells_of_several_lines_are_kept(tmp_path, suffix, names):
  rows = [{"id": str(i), "text": text, "label": label} for i, (text, label) in enumerate(CELLS)]
  rows = [{name: row[name] for name in names} for row in rows]
  assert list(open_rows(write(tmp_path / f"x.{suffix}", rows), tmp_path)) == rows


def test_blank_lines_of_a_table_are_no_rows(tmp_path):
  (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfa,b\n\n1,2\n\n3,4")
  rows = open_rows(tmp_path / "x.csv", tmp_path)
  assert list(rows) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}] and rows.where(1).endswith(":5")


def test_no_parquet_and_a_damaged_zst_are_named(tmp_path):
  (tmp_path / "x.parquet").write_bytes(b"no")
  with pytest.raises(ValueError, match="x.parquet: not a parquet file"):
    open_rows(tmp_path / "x.parquet", tmp_path)
  file = write(tmp_path / "x.jsonl.zst")
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(ValueError, match="x.jsonl.zst: the compressed file is damaged"):
    open_rows(file, tmp_path / "cache")


def test_bad_rows_are_skipped_and_counted_where_that_was_asked_for(tmp_path):
  bad = [b"{", b'{"text": ""}', b"[]", b'{"text": "\xff"}', b'{"text": 3}']
  (tmp_path / "x.jsonl").write_bytes(b"\n".join([b'{"text": "good"}', *bad, b'{"text": "too"}']))
  texts, skipped = open_texts(tmp_path / "x.jsonl", tmp_path, "skip"), {}
  assert list(texts.read(skipped)) == ["good", "too"]
  assert sum(skipped.values()) == 5 and skipped["not a line of JSON"] == 1 and skipped["not UTF-8"] == 1
  with pytest.raises(BadRow, match="x.jsonl:2"):
    list(open_texts(tmp_path / "x.jsonl", tmp_path))
  with pytest.raises(ValueError, match="bad_rows is 'drop'; known"):
    open_texts(tmp_path / "x.jsonl", tmp_path, "drop")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A dataset of two splits with a class label, as `save_to_disk` writes it."""
  datasets = pytest.importorskip("datasets")
  folder = tmp_path_factory.mktemp("hf") / "notes"
  features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["low", "high"])})
  parts = {
    name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]})
    for name, n in (("train", 10), ("test", 4))
  }
  datasets.DatasetDict({name: part.cast(features) for name, part in parts.items()}).save_to_disk(folder)
  return folder


def test_a_dataset_saved_to_disk(saved, tmp_path):
  rows = open_rows({"path": str(saved), "split": "train[2:4]+test"}, tmp_path)
  assert [row["text"] for row in rows] == ["train 2", "train 3", "test 0", "test 1", "test 2", "test 3"]
  assert [row["label"] for row in rows[:2]] == ["low", "high"]
  with pytest.raises(ValueError, match="say which"):
    open_rows(saved, tmp_path)
  again = open_rows({"path": str(saved), "split": "test"}, tmp_path)
  assert again.digest() == open_rows({"path": str(saved), "split": "test"}, tmp_path).digest() != rows.digest()


def test_what_the_library_keeps_beside_a_dataset_is_no_part_of_it(saved, tmp_path):
  import datasets

  source = {"path": str(saved), "split": "train"}
  before = open_rows(source, tmp_path).digest()
  datasets.load_from_disk(str(saved / "train")).filter(lambda row: row["label"] == 0)
  assert list((saved / "train").glob("cache-*")) and open_rows(source, tmp_path).digest() == before


def test_the_same_bytes_by_another_delimiter_are_another_text(tmp_path):
  for suffix in ("csv", "tsv"):
    (tmp_path / f"x.{suffix}").write_text("text\nhello, world\nplain\n")
  digests = {suffix: open_rows(tmp_path / f"x.{suffix}", tmp_path).digest() for suffix in ("csv", "tsv")}
  assert digests["csv"] != digests["tsv"]


def test_a_dataset_by_its_name(tmp_path, monkeypatch):
  """A folder of parquet files is loaded by the library's own code for hub names."""
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
  (tmp_path / "hub").mkdir()
  write(tmp_path / "hub" / "train-00000-of-00001.parquet")
  write(tmp_path / "hub" / "test-00000-of-00001.parquet", ROWS[:3])
  rows = open_rows({"path": f"hf:{tmp_path / 'hub'}", "split": "train[:5]"}, tmp_path)
  assert list(rows) == ROWS[:5]
  with pytest.raises(FileNotFoundError, match="hf:.*nowhere cannot be loaded"):
    open_rows({"path": f"hf:{tmp_path / 'nowhere'}", "split": "train"}, tmp_path)


def batches_of(source, folder, state=None):
  """The stream of one source: six batches, and the states before each."""
  config = get_config()
  with config.unlocked():
    config.data.mixture = {"notes": 1.0}
  config.data.update({"objective": "span_corruption", "decoder_length": 64, "batch_size": 2, "cache_dir": str(folder)})
  texts = open_texts(source, folder)
  stream = build_stream(config, byte_tokenizer(), Domain("d", texts_of([]), texts_of([]), {}), None, {"notes": texts})
  if state:
    stream.restore(json.loads(json.dumps(state)))
  states, batches = [], []
  for _ in range(6 if state is None else 6 - state["batches"]):
    states.append(stream.state())
    batches.append({key: value.tolist() for key, value in next(stream).items()})
  return batches, states


@pytest.mark.parametrize("form", [".jsonl", ".csv.zst", ".parquet", "hf", "saved"])
def test_a_stream_of_any_source_goes_on_where_it_stopped(tmp_path, form, saved, monkeypatch):
  if form == "hf":
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train-00000-of-00001.parquet")
    source = {"path": f"hf:{tmp_path / 'hub'}", "split": "train"}
  else:
    source = {"path": str(saved), "split": "train"} if form == "saved" else write(tmp_path / f"rows{form}")
  straight, states = batches_of(source, tmp_path / "a")
  for at in (1, 4):  # in the first pass and in a later one; with the cache, and without
    assert batches_of(source, tmp_path / ("a" if at == 1 else "b"), states[at])[0] == straight[at:]


TFDS = """
import sys
from pathlib import Path
import tensorflow_datasets as tfds
from data.sources import open_rows
from tests.test_sources import batches_of

class Notes(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["low", "high"])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples("train", 10), "test": self._generate_examples("test", 4)}
  def _generate_examples(self, split, count):
    for i in range(count):
      yield i, {"text": f"{split} {i}", "label": i % 2}

folder = Path(sys.argv[1])
Notes(data_dir=folder, file_format="array_record").download_and_prepare()
rows = open_rows({"path": "tfds:notes", "data_dir": str(folder), "split": "train[:50%]+test"}, folder)
again = open_rows({"path": "tfds:notes", "data_dir": str(folder), "split": "train[:50%]+test"}, folder)
assert len(rows) == 9 and list(rows) == list(again) and rows.digest() == again.digest()
assert {row["text"] for row in rows[5:]} == {f"test {i}" for i in range(4)}
assert all(row["label"] == ("low", "high")[int(row["text"][-1]) % 2] for row in rows), list(rows)
source = {"path": "tfds:notes", "data_dir": str(folder), "split": "train"}
straight, states = batches_of(source, folder / "a")
assert batches_of(source, folder / "b", states[4])[0] == straight[4:]
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  ran = subprocess.run([sys.executable, "-c", TFDS, str(tmp_path)], capture_output=True, text=True, check=False)
  assert ran.returncode == 0, ran.stderr[-2000:]


def test_tfds_that_is_not_there(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  with pytest.raises(FileNotFoundError, match="tfds:no_such_notes cannot be opened"):
    open_rows({"path": "tfds:no_such_notes", "data_dir": str(tmp_path)}, tmp_path)


def test_some_rows_are_from_all_over():
  for labels in ("a" * 50 + "b" * 50, "ab" * 50):  # sorted by label, and in turn
    rows = Listed([{"number": i, "label": label} for i, label in enumerate(labels)])
    some = rows.spread(10)
    assert some == rows.spread(10) and [row["number"] // 10 for row in some] == list(range(10))
    assert 3 <= sum(row["label"] == "a" for row in some) <= 7
  assert rows.spread(0) == rows.spread(100) == rows.spread(1000) == list(rows) and len(rows.spread(1)) == 1


def test_documents_in_memory():
  texts = texts_of(["a", "b", "c"])
  assert list(texts) == ["a", "b", "c"] and list(texts.choose([2, 0])) == ["c", "a"]
  assert texts.digest() != texts_of(["a", "b", "d"]).digest()


def test_a_byte_order_mark_before_a_quoted_name(tmp_path):
  file = tmp_path / "a.csv"
  file.write_bytes(b'\xef\xbb\xbf"in, put","target"\r\n"a","b"\r\n')
  assert open_rows(file, tmp_path)[0] == {"in, put": "a", "target": "b"}


def test_a_number_without_end_is_a_bad_row(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"text": "good"}\n{"text": "bad", "n": ' + "1" * 5000 + "}\n")
  assert list(open_texts(file, tmp_path, "skip")) == ["good"]
  with pytest.raises(BadRow, match="a.jsonl:2: not a line of JSON"):
    list(open_texts(file, tmp_path))


def test_more_files_than_a_usual_limit_allows(tmp_path):
  program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
from scripts import start
start.with_many_files()
from pathlib import Path
from data.sources import open_texts
print(len(list(open_texts({str(tmp_path)!r}, Path("unused")))))
"""
  for number in range(80):
    (tmp_path / f"{number:03}.jsonl").write_text('{"text": "a"}\n')
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent
  )
  assert done.stdout == "80\n", done.stderr


def test_a_file_has_its_bytes_before_it_has_its_name(tmp_path, monkeypatch):
  done, sync, replace = [], os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda *given: done.append("bytes") or sync(*given))
  monkeypatch.setattr(os, "replace", lambda *given: done.append("name") or replace(*given))
  files.put(tmp_path / "a.json", '{"a": "é"}')
  assert done == ["bytes", "name"]  # else a power cut leaves an empty file under the name
  assert files.read_json(tmp_path / "a.json") == {"a": "é"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  "write",
  [
    lambda folder: files.put(folder / "full", "x" * 5000),
    lambda folder: files.unpacked(folder.parent / "a.jsonl.gz", "gzip", folder / "full"),
    lambda folder: tokenised("a", texts_of(["x" * 5000]), byte_tokenizer(), folder / "full"),
    lambda folder: write_scores(folder, {"full": np.arange(5000.0)}),
  ],
)
def test_a_full_disk_is_named_and_what_was_begun_is_gone(tmp_path, write):
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 5000))
  folder, (soft, hard) = tmp_path / "folder", resource.getrlimit(resource.RLIMIT_FSIZE)
  folder.mkdir()
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(OSError, match="full|scores.npz") as caught:
      write(folder)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
  assert caught.value.errno == errno.EFBIG and str(folder) in str(caught.value)
  assert not [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
