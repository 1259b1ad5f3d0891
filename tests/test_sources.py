"""Sources: documents and rows come back whole; a bad line is named by file and line."""

import gzip
import json

import pytest

from data.cache import cache_folder
from data.sources import files_of, open_rows, open_texts


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
