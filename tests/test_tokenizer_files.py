"""Tokenizers of others: special strings stay text though the vocabulary holds them; SentencePiece ids are exact."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data.tokenizer import load_tokenizer, train_tokenizer

TRAPS = "a </s> b<pad> <extra_id_0><unk> s/s"


@pytest.fixture(params=["<extra_id_0>", "▁<extra_id_0>"])
def t5_folder(request, tmp_path) -> Path:
  """A tokenizer.json like T5's or mT5's: a Unigram vocabulary that holds the special tokens as pieces."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("s", -3.0), ("/", -3.0), (request.param, 0.0)]
  backend = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
  if request.param == "<extra_id_0>":
    backend.add_tokens([request.param])  # as some exports have it: not marked special; mT5's are pieces and no more
  backend.save(str(tmp_path / "tokenizer.json"))
  roles = {"pad_token": "<pad>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
  return tmp_path


def test_special_strings_stay_text(t5_folder):
  tokenizer = load_tokenizer(str(t5_folder))
  assert {0, 1, 6}.isdisjoint(tokenizer.encode(TRAPS))


def test_protection_changes_no_other_text(t5_folder):
  plain = tokenizers.Tokenizer.from_file(str(t5_folder / "tokenizer.json"))
  assert load_tokenizer(str(t5_folder)).encode("s/s < s / >") == plain.encode("s/s < s / >").ids


def test_protection_survives_saving(t5_folder, tmp_path):
  tokenizer = load_tokenizer(str(t5_folder))
  tokenizer.save(tmp_path / "saved")
  loaded = load_tokenizer(str(tmp_path / "saved"))
  assert loaded.encode(TRAPS) == tokenizer.encode(TRAPS)
  assert loaded.fingerprint() == tokenizer.fingerprint()


def test_roles_and_sentinels_of_a_t5_folder_are_found(t5_folder):
  tokenizer = load_tokenizer(str(t5_folder))
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.start_id) == (0, 1, 2, 0)
  assert (tokenizer.sentinel_ids, tokenizer.vocab_size) == ((6,), 7)
  assert tokenizer.decode([4, 6, 4]) == "s<extra_id_0>s"


def test_a_saved_folder_that_lost_its_vocabulary_is_an_error(tmp_path):
  train_tokenizer(["text"], 400, sentinels=5).save(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
    load_tokenizer(str(tmp_path))


GEMMA, LLAMA = ("pad", "eos", "bos"), ("unk", "bos", "eos")  # the first ids


def with_bos(folder: Path, roles: tuple[str, ...]) -> Path:
  """Writes a tokenizer that has a BOS beside its EOS."""
  vocabulary = {**{f"<{role}>": number for number, role in enumerate(roles)}, "a": 3}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({f"{role}_token": f"<{role}>" for role in roles}))
  return folder


@pytest.mark.parametrize(("asked", "start"), [(None, 2), (0, 0)])
def test_a_row_starts_from_bos_where_there_is_one_and_from_what_the_weights_say(tmp_path, asked, start):
  with_bos(tmp_path, GEMMA)
  (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": asked}))
  assert load_tokenizer(str(tmp_path)).start_id == start


@pytest.mark.parametrize(("roles", "start"), [(GEMMA, 2), (LLAMA, 1)])
def test_an_export_keeps_bos(tmp_path, roles, start):
  import transformers

  (tmp_path / "out").mkdir()
  load_tokenizer(str(with_bos(tmp_path, roles))).export(tmp_path / "out", begins=True)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
  assert load_tokenizer(str(tmp_path / "out")).start_id == theirs.bos_token_id == start
  assert theirs("a")["input_ids"][:2] == [start, 3]


def test_lone_sentencepiece_file_with_t5_layout(shared):
  tokenizer = load_tokenizer(str(shared / "tokenizers" / "sentencepiece-toy-26"))
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.start_id) == (0, 1, 2, 0)
  assert tokenizer.sentinel_ids == tuple(range(125, 25, -1))
  assert tokenizer.encode(" lead") == [3, 9, 4, 5, 21]  # as SentencePiece gives


def test_lone_sentencepiece_file_gives_its_ids(shared):
  tokenizer = load_tokenizer(str(shared / "tokenizers" / "sentencepiece-c4-32k"))
  known = [554, 3032, 166, 256, 1566, 23202, 9219, 13908, 1145]  # as SentencePiece gives
  assert tokenizer.encode("Héllo  wörld 123 \n\n x") == known
  assert tokenizer.encode("  Héllo  wörld 123 \n\n x \n") == known  # outer space is dropped, too
  assert tokenizer.decode(known) == "Héllo wörld 123 x"
  assert (tokenizer.unk_id, tokenizer.start_id, tokenizer.eos_id) == (0, 1, 2)
  assert {1, 2}.isdisjoint(tokenizer.encode(TRAPS + " <s>"))
