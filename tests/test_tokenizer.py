"""Tokenizers: round trips, sentinels at the top, and user text that never becomes a special token."""

import json

import pytest

from data import files
from data.tokenizer import byte_tokenizer, is_saved, load_tokenizer, train_tokenizer

WORDS = "patient ward urgent routine plan review fracture clinic doctor nurse fluids bed rest wound stitches"
TEXTS = ["The patient has 12 mg of naïve α-blockers.", "Rx amox 500mg PO TDS 5/7, r/v GP 2/52.", WORDS] * 30
TRICKY = "a <pad> b </s> c <extra_id_0> d <unk>"


@pytest.fixture(scope="module")
def trained():
  return train_tokenizer(TEXTS, 380, sentinels=20)


@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_round_trip_and_special_strings_stay_text(which, trained):
  tokenizer = byte_tokenizer() if which == "bytes" else trained
  for text in [*TEXTS[:2], TRICKY, "", "日本語 🙂\n\ttabs"]:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, *tokenizer.sentinel_ids} & set(ids)


def test_byte_layout():
  tokenizer = byte_tokenizer()
  assert tokenizer.encode("ab") == [100, 101] and tokenizer.vocab_size == 384
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id) == (0, 1, 0)
  assert tokenizer.sentinel_ids[:2] == (383, 382) and len(tokenizer.sentinel_ids) == 125


def test_trained_layout(trained):
  assert trained.vocab_size == 380
  assert trained.sentinel_ids == tuple(range(379, 359, -1))
  assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.start_id) == (0, 1, 2, 0)
  assert trained.decode([379, *trained.encode("x"), 378, 1, 0]) == "<extra_id_0>x<extra_id_1>"


def test_training_is_deterministic(trained):
  assert train_tokenizer(TEXTS, 380, sentinels=20).fingerprint() == trained.fingerprint()
  assert train_tokenizer(TEXTS[:30], 370, sentinels=20).fingerprint() != trained.fingerprint()


def test_a_small_corpus_gives_fewer_tokens_and_says_so(capsys):
  tokenizer = train_tokenizer(["aa"], 2000, sentinels=5)
  assert tokenizer.vocab_size < 300 and "fewer than the 2000 asked for" in capsys.readouterr().out
  assert tokenizer.sentinel_ids[0] == tokenizer.vocab_size - 1


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(ValueError, match="at least 359"):
    train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_saved_and_loaded_it_is_the_same(which, trained, tmp_path):
  tokenizer = byte_tokenizer() if which == "bytes" else trained
  tokenizer.save(tmp_path)
  loaded = load_tokenizer(str(tmp_path))
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert loaded.encode(TRICKY) == tokenizer.encode(TRICKY)


def test_transformers_reads_a_trained_tokenizer(trained, tmp_path):
  transformers = pytest.importorskip("transformers")
  trained.save(tmp_path)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded(TEXTS[0], add_special_tokens=False)["input_ids"] == trained.encode(TEXTS[0])
  assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
  assert loaded.convert_tokens_to_ids("<extra_id_0>") == trained.sentinel_ids[0]


def test_a_hugging_face_folder_without_sentinels_gets_some(trained, tmp_path, capsys):
  train_tokenizer(TEXTS, 380, sentinels=0).save(tmp_path)
  (tmp_path / "argot_tokenizer.json").unlink()
  loaded = load_tokenizer(str(tmp_path))
  assert "added 100 sentinels" in capsys.readouterr().out
  assert loaded.sentinel_ids[0] == loaded.vocab_size - 1
  assert (loaded.pad_id, loaded.eos_id, loaded.start_id) == (0, 1, 0)


def test_missing_tokenizer_says_what_was_expected(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(FileNotFoundError, match="tokenizer.json"):
    load_tokenizer(str(tmp_path / "nothing"))


def test_a_tokenizer_without_an_end_is_refused(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / "argot_tokenizer.json").unlink()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
  with pytest.raises(ValueError, match="no end-of-sequence token"):
    load_tokenizer(str(tmp_path))


def test_real_gpt2_files(shared):
  tokenizer = load_tokenizer(str(shared / "tokenizers" / "gpt2"))
  assert tokenizer.encode("Hello world") == [15496, 995]
  assert tokenizer.eos_id == tokenizer.start_id == 50256
  assert tokenizer.vocab_size == 50357 and tokenizer.sentinel_ids[0] == 50356
  assert tokenizer.decode(tokenizer.encode(TRICKY)) == TRICKY


def test_real_sentencepiece_model(shared):
  tokenizer = load_tokenizer(str(shared / "tokenizers" / "sentencepiece-c4-32k"))
  text = "The patient was treated for pneumonia."
  assert tokenizer.decode(tokenizer.encode(text)).strip() == text
  assert tokenizer.eos_id == 2 and tokenizer.vocab_size == 32768 + 100


@pytest.mark.parametrize("plain", [True, False])
def test_bytes_are_counted_also_where_a_character_is_cut(plain):
  text = "38 °C, Müdigkeit; 每天吃药 🙂"
  tokenizer = byte_tokenizer() if plain else train_tokenizer(["a note of fever"] * 20, 400)
  ids = tokenizer.encode(text)
  assert len(ids) > len(text)  # characters are cut
  for where in range(len(ids) + 1):
    assert tokenizer.count_bytes(ids[:where]) + tokenizer.count_bytes(ids[where:]) == len(text.encode())
  assert tokenizer.count_bytes([tokenizer.eos_id, tokenizer.pad_id, *tokenizer.sentinel_ids]) == 0


def test_a_save_is_whole_or_not_there(trained, tmp_path, monkeypatch):
  trained.save(tmp_path)
  before = (tmp_path / "tokenizer.json").read_bytes()
  monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
  with pytest.raises(OSError, match="no space"):
    trained.save(tmp_path)
  with pytest.raises(OSError, match="no space"):
    trained.save(tmp_path / "new")
  assert (tmp_path / "tokenizer.json").read_bytes() == before and load_tokenizer(str(tmp_path)).vocab_size == 380
  assert is_saved(tmp_path) and not is_saved(tmp_path / "new") and not list(tmp_path.rglob("*.part"))
  (tmp_path / "tokenizer.json").write_bytes(before[:100])
  with pytest.raises(ValueError, match="tokenizer.json is no tokenizer.*train it again"):
    load_tokenizer(str(tmp_path))
