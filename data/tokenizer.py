"""Tokenizers: a Hugging Face folder (or hub name), the built-in byte-level one, or one trained on the corpus.

Whatever the source, text is encoded by one `tokenizers.Tokenizer` with special tokens switched off, so that a "<pad>"
or "<extra_id_0>" in a user's text stays text. Sentinels descend from the last id, as in T5.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.files import put, read_json

SENTINELS = 100  # that a tokenizer without any gets
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")
_ROLES = "argot_tokenizer.json"  # written by `save`: ids of pad, eos, …, which tokenizer.json does not hold


class Tokenizer:
  """Text to ids and back.

  Args:
    backend: the tokenizer; None for plain bytes.
    roles: `pad_id`, `eos_id`, `unk_id` (or None), `start_id`, `vocab_size`, `sentinel_ids` (first one first), and where
      there is one, `chat_template` (Jinja) and the `special_names` it may use, such as {"bos_token": "<s>"}.

  Attributes:
    vocab_size: every id, sentinels included, is below it.
    pad_id, eos_id, unk_id, start_id: special ids; a decoder row starts from `start_id`.
    sentinel_ids: the ids that stand for hidden spans, descending; a ByT5's are bytes, too.
    chat_template, special_names: see `roles`.
  """

  def __init__(self, backend: tokenizers.Tokenizer | None, roles: dict):
    self._backend = backend
    self._roles = {**roles, "sentinel_ids": list(roles["sentinel_ids"])}
    self.vocab_size: int = roles["vocab_size"]
    self.pad_id: int = roles["pad_id"]
    self.eos_id: int = roles["eos_id"]
    self.unk_id: int | None = roles["unk_id"]
    self.start_id: int = roles["start_id"]
    self.sentinel_ids: tuple[int, ...] = tuple(roles["sentinel_ids"])
    self.chat_template: str | None = roles.get("chat_template")
    self.special_names: dict[str, str] = roles.get("special_names", {})
    added = backend.get_added_tokens_decoder() if backend else {}
    self._added = {number: token.content for number, token in added.items()}
    self._named = {token.content: number for number, token in added.items() if token.special}
    self._special = {self.pad_id, self.eos_id, self.start_id}
    # A ByT5's sentinels are bytes: only those from 0xF5 on, which UTF-8 never has, are in no text.
    least = 0 if backend else _BYTE_OFFSET + 0xF5
    self._sentinels = {token: number for number, token in enumerate(self.sentinel_ids) if token >= least}
    if backend is not None:
      backend.encode_special_tokens = True
      backend.no_padding()
      backend.no_truncation()

  def encode(self, text: str) -> list[int]:
    """Encodes text; no special token is added or made from it."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes several texts, on several threads where the backend can."""
    if self._backend is None:
      return [[byte + _BYTE_OFFSET for byte in text.encode("utf-8")] for text in texts]
    return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

  def special_strings(self) -> list[str]:
    """Returns how the special tokens are written."""
    return list(self._named)

  def is_special(self, token: int) -> bool:
    """Says whether no text holds a token."""
    return token in self._special or token in self._sentinels or token in self._named.values()

  def encode_special(self, text: str) -> list[int]:
    """Encodes text that may name special tokens, such as a chat template's own; never what a user wrote."""
    names = sorted(self._named, key=len, reverse=True)
    pieces = re.split("|".join(f"({re.escape(name)})" for name in names), text) if names else [text]
    ids = [[self._named[piece]] if piece in self._named else self.encode(piece) for piece in pieces if piece]
    return [token for part in ids for token in part]

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids; pad, eos and start vanish, sentinel k reads `<extra_id_k>`."""
    parts: list[str] = []
    run: list[int] = []
    for token in (int(token) for token in ids):
      if token in self._sentinels:
        parts += [self._decode_plain(run), f"<extra_id_{self._sentinels[token]}>"]
        run = []
      elif token not in self._special and token < self.vocab_size:
        run.append(token)
    return "".join([*parts, self._decode_plain(run)])

  def count_bytes(self, ids: Iterable[int]) -> int:
    """Counts the UTF-8 bytes that tokens stand for, also where they begin or end within a character."""
    ids = [token for token in ids if token not in self._special and token not in self._sentinels]
    if self._backend is None:
      return len(ids)
    if not isinstance(self._backend.decoder, decoders.ByteLevel):
      return len(self.decode(ids).encode("utf-8"))
    # In such a vocabulary each byte is written as one character; what was added to it is plain text.
    written = (self._added[i].encode() if i in self._added else self._backend.id_to_token(i) or "" for i in ids)
    return sum(map(len, written))

  def _decode_plain(self, ids: list[int]) -> str:
    if self._backend is None:
      return bytes(i - _BYTE_OFFSET for i in ids if 0 <= i - _BYTE_OFFSET < 256).decode("utf-8", errors="replace")
    return self._backend.decode(ids, skip_special_tokens=False) if ids else ""

  def fingerprint(self) -> str:
    """Returns a hash of everything that shapes ids."""
    text = json.dumps(self._roles, sort_keys=True) + (self._backend.to_str() if self._backend else "bytes")
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def save(self, folder: str | Path) -> None:
    """Writes the tokenizer; `load_tokenizer` reads it, and Hugging Face `AutoTokenizer` where it is not plain bytes.

    Each file is put in place as a whole, and the one that `is_saved` looks for last.
    """
    folder = Path(folder)
    if self._backend is not None:
      self._write(folder, self._backend, {})
    put(folder / _ROLES, json.dumps(self._roles) + "\n")

  def export(self, folder: str | Path, begins: bool, ends: bool = True) -> None:
    """Writes it for transformers: `AutoTokenizer` gives a prompt the ids that a model is asked with here.

    Args:
      folder: exists.
      begins: a prompt begins with `start_id` (decoder-only), which is BOS then.
      ends: a prompt ends in EOS; else the model goes on with it.
    """
    if self._roles == byt5_tokenizer()._roles and not begins:
      put(Path(folder) / "tokenizer_config.json", json.dumps({"tokenizer_class": _BYT5}) + "\n")
      return
    backend = tokenizers.Tokenizer.from_str(self._backend.to_str()) if self._backend else self._bytes_backend()
    start, end = backend.id_to_token(self.start_id), backend.id_to_token(self.eos_id)
    names = {start: self.start_id, end: self.eos_id}
    form = [*([start] if begins else []), "$A", *([end] if ends else [])]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=list(names.items()))
    self._write(Path(folder), backend, {"bos_token": start} if begins else {})

  def _bytes_backend(self) -> tokenizers.Tokenizer:
    """Returns plain bytes as a BPE without merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import, and only this needs it

    apart = {t: f"<extra_id_{i}>" for i, t in enumerate(self.sentinel_ids) if t >= _BYTE_OFFSET + 256}
    names = {0: "<pad>", 1: "</s>", 2: "<unk>"} | apart
    vocabulary = {name: token for token, name in names.items()}
    vocabulary |= {character: byte + _BYTE_OFFSET for byte, character in bytes_to_unicode().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([names[token] for token in sorted(names)])
    return backend

  def _write(self, folder: Path, backend: tokenizers.Tokenizer, more: dict[str, str]) -> None:
    """Writes Hugging Face's files; `more` names tokens of further roles."""
    put(folder / "tokenizer.json", backend.to_str(pretty=True))
    name = backend.id_to_token
    config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "pad_token": name(self.pad_id),
      "eos_token": name(self.eos_id),
      "unk_token": None if self.unk_id is None else name(self.unk_id),
      "extra_special_tokens": [name(token) for token in self.sentinel_ids],
      **more,
    }
    if self.chat_template:
      config = {**self.special_names, **config, "chat_template": self.chat_template}
    put(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


def is_saved(folder: str | Path) -> bool:
  """Says whether `Tokenizer.save` has written a whole tokenizer there."""
  return (Path(folder) / _ROLES).exists()


def _from_file(file: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises no narrower one
    raise ValueError(f"{file} is no tokenizer ({error}); put it back, or fetch or train it again") from error


_BYTE_OFFSET = 3  # after pad, eos, unk
_BYTE_SENTINELS = 125
_BYT5 = "ByT5Tokenizer"  # transformers' class


def byte_tokenizer() -> Tokenizer:
  """The built-in tokenizer, as ByT5: pad 0, eos 1, unk 2, byte b is b + 3; sentinels down from the last id, 383."""
  last = _BYTE_OFFSET + 256 + _BYTE_SENTINELS - 1
  return _plain_bytes(range(last, last - _BYTE_SENTINELS, -1))


def byt5_tokenizer() -> Tokenizer:
  """That of a published ByT5: `byte_tokenizer`, but its pre-training hid spans behind the last 100 bytes, 258 down.

  Reference:
    Xue et al. 2022, §3.1.
  """
  last = _BYTE_OFFSET + 256 - 1
  return _plain_bytes(range(last, last - SENTINELS, -1))


def _plain_bytes(sentinels: Sequence[int]) -> Tokenizer:
  size = _BYTE_OFFSET + 256 + _BYTE_SENTINELS
  roles = {"vocab_size": size, "pad_id": 0, "eos_id": 1, "unk_id": 2, "start_id": 0, "sentinel_ids": sentinels}
  return Tokenizer(None, roles)


def train_tokenizer(texts: Iterable[str], vocab_size: int, sentinels: int = SENTINELS) -> Tokenizer:
  """Trains a byte-level BPE tokenizer.

  Args:
    texts: the corpus.
    vocab_size: ids in all: `<pad>` 0, `</s>` 1, `<unk>` 2, the 256 bytes, merges, and the sentinels at the top.
    sentinels: how many sentinels.

  Returns:
    The tokenizer. A corpus too small for `vocab_size` gives a smaller one, and says so.

  Raises:
    ValueError: `vocab_size` has no room for bytes and sentinels.
  """
  least = _BYTE_OFFSET + 256 + sentinels
  if vocab_size < least:
    parts = f"3 special tokens, 256 bytes, {sentinels} sentinels"
    raise ValueError(f"vocab_size must be at least {least} ({parts}), got {vocab_size}")
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # words, numbers, the rest; as GPT-2
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - sentinels,
    special_tokens=["<pad>", "</s>", "<unk>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  if backend.get_vocab_size() < vocab_size - sentinels:
    print(f"the corpus gives {backend.get_vocab_size() + sentinels} tokens, fewer than the {vocab_size} asked for")
  ids = _add_sentinels(backend, sentinels)
  roles = {"vocab_size": backend.get_vocab_size(), "pad_id": 0, "eos_id": 1, "unk_id": 2, "start_id": 0}
  return Tokenizer(backend, {**roles, "sentinel_ids": ids})


def _add_sentinels(backend: tokenizers.Tokenizer, count: int) -> list[int]:
  """Adds `<extra_id_k>` so that ids descend from the last one; returns them, first sentinel first."""
  names = [f"<extra_id_{number}>" for number in range(count)]
  backend.add_special_tokens(names[::-1])
  return [backend.token_to_id(name) for name in names]


def _find_sentinels(backend: tokenizers.Tokenizer) -> list[int]:
  """Returns the ids of the sentinels that a vocabulary has, first sentinel first."""
  for form in ("▁<extra_id_{}>", "<extra_id_{}>"):  # mT5's are pieces that begin a word; the others are T5's
    ids = (backend.token_to_id(form.format(number)) for number in itertools.count())
    if found := list(itertools.takewhile(lambda token: token is not None, ids)):
      return found
  return []


def load_tokenizer(path: str) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    path: "bytes"; a folder with `tokenizer.json`, with OpenAI's `encoder.json` and `vocab.bpe`, with a lone
      SentencePiece Unigram file, or with anything that Hugging Face's AutoTokenizer reads; or a hub name.

  Returns:
    The tokenizer. Sentinels that it lacks are added at the top of the vocabulary, and that is printed.

  Raises:
    FileNotFoundError: nothing there that can be read.
  """
  if path == "bytes":
    return byte_tokenizer()
  folder = Path(path)
  if (folder / _ROLES).exists():
    return _saved(folder)
  if _names(folder).get("tokenizer_class") == _BYT5:
    return byt5_tokenizer()
  if (folder / "encoder.json").exists() and (folder / "vocab.bpe").exists():
    return _with_roles(_openai(folder), {"eos_token": "<|endoftext|>"}, path)
  if (folder / "tokenizer.json").exists():
    return _with_roles(_from_file(folder / "tokenizer.json"), _names(folder), path)
  models_here = [folder / name for name in _SENTENCEPIECE if (folder / name).exists()]
  if models_here and not (folder / "tokenizer_config.json").exists():
    return _from_sentencepiece(models_here[0])
  return _from_transformers(path)


def _saved(folder: Path) -> Tokenizer:
  """Loads what `Tokenizer.save` wrote."""
  roles, file = read_json(folder / _ROLES), folder / "tokenizer.json"
  if file.exists():
    return Tokenizer(_from_file(file), roles)
  for plain in (byte_tokenizer(), byt5_tokenizer()):
    if roles == plain._roles:
      return plain
  raise FileNotFoundError(f"{file} is missing: {_ROLES} beside it is of a tokenizer with {roles['vocab_size']} ids")


def _openai(folder: Path) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend


def _names(folder: Path) -> dict[str, str]:
  """Reads which token plays which role from the folder's Hugging Face files."""
  names: dict[str, str] = {}
  for file in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / file).exists():
      for key, value in json.loads((folder / file).read_text()).items():
        if key in ("pad_token", "eos_token", "bos_token", "unk_token", "tokenizer_class") and value:
          names[key] = value["content"] if isinstance(value, dict) else value
        if key == "chat_template" and value:  # one, or several by name
          names[key] = (
            value if isinstance(value, str) else {part["name"]: part["template"] for part in value}.get("default")
          )
  if (folder / "chat_template.jinja").exists():
    names["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  return names


def _from_transformers(path: str) -> Tokenizer:
  import transformers  # slow to import, and only these forms need it

  try:
    loaded = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
  except (OSError, ValueError, ImportError) as error:
    raise FileNotFoundError(
      f"no tokenizer in {path!r}: expected 'bytes', a folder with tokenizer.json, encoder.json + vocab.bpe, or files "
      f"that transformers.AutoTokenizer reads (SentencePiece needs `pip install sentencepiece`), or a hub name: {error}"
    ) from error
  backend = getattr(loaded, "backend_tokenizer", None)
  if backend is None:
    raise FileNotFoundError(f"the tokenizer in {path!r} has no fast form; save it as tokenizer.json and use that")
  names = {key: getattr(loaded, key) for key in ("pad_token", "eos_token", "bos_token", "unk_token", "chat_template")}
  return _with_roles(backend, {key: value for key, value in names.items() if value}, path)


def _from_sentencepiece(file: Path) -> Tokenizer:
  """Builds a tokenizer from a lone SentencePiece file, such as T5's `spiece.model`.

  Raises:
    ValueError: not a Unigram model; of a BPE file the merges are not known, and guessed ones give other ids.
  """
  from transformers.utils import sentencepiece_model_pb2_new as schema  # slow to import; the format's protobuf

  proto = schema.ModelProto()
  proto.ParseFromString(file.read_bytes())
  trained, normal = proto.trainer_spec, proto.normalizer_spec
  if trained.model_type != trained.UNIGRAM:
    raise ValueError(f"{file} is not a Unigram model; save tokenizer.json beside it (AutoTokenizer's save_pretrained)")
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  backend = tokenizers.Tokenizer(models.Unigram(pieces, trained.unk_id, trained.byte_fallback))
  steps = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
  if normal.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  backend.normalizer = normalizers.Sequence(steps)
  prepend = "always" if normal.add_dummy_prefix else "never"
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
  space = decoders.Metaspace(prepend_scheme=prepend)
  backend.decoder = decoders.Sequence([decoders.ByteFallback(), space]) if trained.byte_fallback else space
  backend.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)])
  ids = {role: getattr(trained, f"{role}_id") for role in ("pad", "eos", "bos", "unk")}
  names = {f"{role}_token": proto.pieces[number].piece for role, number in ids.items() if number >= 0}
  return _with_roles(backend, names, str(file))


def _keep_as_text(backend: tokenizers.Tokenizer, names: Iterable[str]) -> None:
  """Makes special tokens unreachable from text.

  A Unigram vocabulary holds "</s>" as a piece like any other, and would choose it for the characters. Cutting the text
  after its "<" leaves only ordinary pieces to choose from.
  """
  backend.encode_special_tokens = True
  reached = [name for name in names if backend.token_to_id(name) in backend.encode(name, add_special_tokens=False).ids]
  if reached:
    cut = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in reached)
    before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
    split = pre_tokenizers.Split(tokenizers.Regex(cut), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _with_roles(backend: tokenizers.Tokenizer, names: dict[str, str], path: str) -> Tokenizer:
  chat_template = names.pop("chat_template", None)
  names.pop("tokenizer_class", None)
  ids = {key: backend.token_to_id(value) for key, value in names.items()}
  eos = ids.get("eos_token")
  if eos is None:
    raise ValueError(f"the tokenizer in {path!r} has no end-of-sequence token; set eos_token in tokenizer_config.json")
  pad, bos = ids.get("pad_token"), ids.get("bos_token")
  sentinels = _find_sentinels(backend)
  if not sentinels:
    sentinels = _add_sentinels(backend, SENTINELS)
    print(f"tokenizer {path}: added {SENTINELS} sentinels, ids {sentinels[-1]} to {sentinels[0]}")
  backend.add_special_tokens([backend.id_to_token(token) for token in sentinels])  # special, if they were not
  _keep_as_text(backend, [token.content for token in backend.get_added_tokens_decoder().values() if token.special])
  # A row starts from BOS. T5's vocabularies have none, and their decoder starts from pad (0); GPT-2 from EOS.
  start = bos if bos is not None else pad if pad == 0 else eos
  told = Path(path) / "config.json"  # beside a model's weights, which know better where they are an encoder-decoder's
  if told.is_file() and isinstance(asked := json.loads(told.read_text()).get("decoder_start_token_id"), int):
    start = asked
  roles = {
    "vocab_size": max(backend.get_vocab().values()) + 1,  # ids may have gaps
    "pad_id": eos if pad is None else pad,
    "eos_id": eos,
    "unk_id": ids.get("unk_token"),
    "start_id": start,
    "sentinel_ids": sentinels,
  }
  if chat_template:
    roles |= {"chat_template": chat_template, "special_names": names}
  return Tokenizer(backend, roles)
