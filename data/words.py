"""What counts as a word, where texts are compared or measured."""

import re

_CHARACTER = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese and Japanese have no spaces: a character is a word


def words(text: str) -> list[str]:
  """Returns what stands between white space, in lower case, and each Chinese or Japanese character.

  Example:
    >>> words("Take 2 每天")
    ['take', '2', '每', '天']
  """
  return _CHARACTER.sub(r" \g<0> ", text.lower()).split()
