"""Trains a byte-level BPE tokenizer with sentinel tokens on a corpus; Hugging Face AutoTokenizer reads the folder, too.

Example:
  argot tokenizer --corpus=my_domain/corpus.jsonl --vocab_size=8192 --to=my_tokenizer
"""

import itertools

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot tokenizer`."""
  values = flags.new()
  flags.string(values, "corpus", None, "text: a file, folder or glob, hf:NAME or tfds:NAME, see data/sources.py")
  flags.string(values, "split", "", "of a corpus that has several: train, train[:90%], train+test")
  flags.integer(values, "vocab_size", 8192, "ids in all, sentinels included")
  flags.integer(values, "sentinels", 100, "sentinel tokens for span corruption")
  flags.string(values, "to", None, "folder to write")
  values = flags.parse(values, "tokenizer", __doc__, arguments, ["corpus", "to"])
  from data.cache import cache_folder
  from data.sources import open_texts
  from data.tokenizer import train_tokenizer

  texts = open_texts({"path": values.corpus, "split": values.split}, cache_folder(""))
  trained = train_tokenizer(texts, values.vocab_size, values.sentinels)
  trained.save(values.to)
  sample = list(itertools.islice(texts, 1000))
  tokens = sum(len(ids) for ids in trained.encode_batch(sample))
  size = sum(len(text.encode()) for text in sample)
  print(f"wrote {values.to}: {trained.vocab_size} tokens, {size / max(tokens, 1):.2f} bytes a token")
