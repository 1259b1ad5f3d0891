"""Trains a byte-level BPE tokenizer with sentinel tokens on a corpus; Hugging Face AutoTokenizer reads the folder, too.

Example:
  argot tokenizer --corpus=my_domain/corpus.jsonl --vocab_size=8192 --to=my_tokenizer
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot tokenizer`."""
  values = flags.new()
  flags.string(values, "corpus", None, "a .jsonl (field text) or .txt file, also .gz; a folder or glob of them")
  flags.integer(values, "vocab_size", 8192, "ids in all, sentinels included")
  flags.integer(values, "sentinels", 100, "sentinel tokens for span corruption")
  flags.string(values, "to", None, "folder to write")
  values = flags.parse(values, "tokenizer", __doc__, arguments, ["corpus", "to"])
  from data.sources import read_texts
  from data.tokenizer import train_tokenizer

  texts = read_texts(values.corpus)
  trained = train_tokenizer(texts, values.vocab_size, values.sentinels)
  trained.save(values.to)
  sample = texts[:1000]
  tokens = sum(len(ids) for ids in trained.encode_batch(sample))
  size = sum(len(text.encode()) for text in sample)
  print(f"wrote {values.to}: {trained.vocab_size} tokens, {size / max(tokens, 1):.2f} bytes a token")
