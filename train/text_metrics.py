"""Metrics of generated text, from kept libraries (rouge-score, sacrebleu), and the words that they count.

Each is made into parts, a few numbers an example; its value is a function of the parts' sums. So a corpus metric such
as BLEU is its published value, and intervals (train/statistics.py) need nothing but other sums of the same parts. Parts
are float64 [n,K], sums are [...,K], values [...].
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data.words import words

Texts = Sequence[str]
_REPEATED = 4  # words in an n-gram whose repetition is counted
_COPIED = 3  # words in an n-gram that counts as copied
_CHARACTERS = 6  # the longest n-gram of chrF
_WORD = re.compile("[a-z0-9]+")  # of ROUGE
_BETA = 2.0  # chrF: recall weighs beta times as much as precision


def ratio(sums: np.ndarray) -> np.ndarray:
  """Returns the first sum by the second, 0 where the second is 0: a mean, where the second part is 1.

  Example:
    >>> ratio(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [0.75, 0.0]
  """
  return np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1e-300), 0.0)


def means(scores: Iterable[float]) -> np.ndarray:
  """Returns the parts of a mean, float64 [n,2]: each example's score, and 1."""
  return np.array([[float(score), 1.0] for score in scores])


def rouge(name: str) -> Callable[[Texts, Texts, Texts], np.ndarray]:
  """Makes the parts of a ROUGE F1 (no stemming; `rougeL` takes a text as one sentence).

  Reference:
    Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), as in the rouge-score library, whose words are
    lower-cased runs of a-z and 0-9; where most letters of the targets are others they are runs of any letters, digits
    and the marks on them (`_script_words`), for the library would find hardly a word.
  """

  def parts(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
      @functools.cache  # noqa: B019 - for one call of `parts`: a consensus compares each text with all others
      def tokenize(self, text: str) -> list[str]:
        return words_of(text)

    letters = [letter.isascii() for target in targets for letter in target if letter.isalpha()]
    other = 2 * sum(letters) < len(letters)
    words_of = _script_words if other else lambda text: _WORD.findall(text.lower())
    scorer = RougeScorer((name,), tokenizer=Words())
    return means(scorer.score(target, output)[name].fmeasure for output, target in zip(outputs, targets, strict=True))

  return parts


def exact_match(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of the share of equal texts, white space around them aside."""
  return means(output.strip() == target.strip() for output, target in zip(outputs, targets, strict=True))


def token_f1(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of the mean F1 over words, without case, punctuation and English articles.

  Reference:
    Rajpurkar et al., "SQuAD" (2016), section 6.1, as the evaluation script of SQuAD 2.0 has it: two texts without a
    word are equal, and score 1.
  """

  def one(output: str, target: str) -> float:
    written, right = _answer_words(output), _answer_words(target)
    if not written or not right:
      return float(written == right)
    return 2 * (Counter(written) & Counter(right)).total() / (len(written) + len(right))

  return means(one(output, target) for output, target in zip(outputs, targets, strict=True))


def bleu(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of BLEU: right n-grams and all n-grams of 1 to 4 tokens, tokens of the output, of the target.

  Reference:
    Papineni et al. (2002), as `sacrebleu.corpus_bleu` with its defaults (13a tokens, exponential smoothing), by 100.
  """
  from sacrebleu.metrics import BLEU

  count = BLEU(effective_order=True).sentence_score  # effective_order is for its score, which is not used
  found = [count(output, [target]) for output, target in zip(outputs, targets, strict=True)]
  return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], np.float64)


def bleu_of(sums: np.ndarray) -> np.ndarray:
  """Returns BLEU from the sums of `bleu`'s parts."""
  from sacrebleu.metrics import BLEU

  def one(row: np.ndarray) -> float:
    counts = [round(value) for value in row]
    score = BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score
    return min(score / 100, 1.0)  # exp(log(100)) is a little more than 100

  return np.apply_along_axis(one, -1, sums)


def chrf(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of chrF: n-grams of 1 to 6 characters of the output, those of the target, those in both.

  Reference:
    Popović, "chrF: character n-gram F-score" (2015), as `sacrebleu.corpus_chrf` with its defaults (without spaces,
    beta 2), by 100.
  """
  from sacrebleu.metrics.helpers import extract_all_char_ngrams

  def one(output: str, target: str) -> list[int]:
    counts = []
    for written, right in zip(*(extract_all_char_ngrams(text, _CHARACTERS) for text in (output, target)), strict=True):
      # As there: where the target is too short for an n-gram, those of the output do not count either.
      counts += [written.total() if right else 0, right.total(), (written & right).total()]
    return counts

  return np.array([one(output, target) for output, target in zip(outputs, targets, strict=True)], np.float64)


def chrf_of(sums: np.ndarray) -> np.ndarray:
  """Returns chrF from the sums of `chrf`'s parts: the F-score of the mean precision and recall over lengths."""
  written, right, both = np.moveaxis(sums.reshape(*sums.shape[:-1], _CHARACTERS, 3), -1, 0)
  used = (written > 0) & (right > 0)
  orders = np.maximum(used.sum(axis=-1), 1)
  precision = (used * both / np.maximum(written, 1)).sum(axis=-1) / orders
  recall = (used * both / np.maximum(right, 1)).sum(axis=-1) / orders
  weighed = _BETA**2 * precision + recall
  return np.where(weighed > 0, (1 + _BETA**2) * precision * recall / np.maximum(weighed, 1e-300), 0.0)


def length_ratio(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of words written by words of the targets: 1 is as long as it should be."""
  counts = [[len(words(output)), len(words(target))] for output, target in zip(outputs, targets, strict=True)]
  return np.array(counts, np.float64)


def repetition_rate(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of the share of 4-grams of words that stood in the same output before; of all outputs together.

  Reference:
    Welleck et al., "Neural text generation with unlikelihood training" (2020), section 3: seq-rep-4, pooled.
  """
  grams = [_grams(output, _REPEATED) for output in outputs]
  return np.array([[len(found) - len(set(found)), len(found)] for found in grams], np.float64)


def copy_rate(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of the share of the outputs' 3-grams of words that stand in their input; of all together.

  Reference:
    See et al., "Get to the point" (2017), section 6.2: 1 minus their share of novel 3-grams.
  """
  known = [set(_grams(text, _COPIED)) for text in inputs]
  grams = [_grams(output, _COPIED) for output in outputs]
  counts = [[sum(gram in here for gram in found), len(found)] for found, here in zip(grams, known, strict=True)]
  return np.array(counts, np.float64)


class Metric(NamedTuple):
  """A metric of generated text.

  Attributes:
    parts: (outputs, targets, inputs) -> [n,K].
    value: the parts' sums [...,K] -> [...].
    better: 1: more is better; -1: less is; 0: it describes, and cannot be a headline.
  """

  parts: Callable[[Texts, Texts, Texts], np.ndarray]
  value: Callable[[np.ndarray], np.ndarray]
  better: int


# The first one is the headline of a task that names none.
GENERATION: dict[str, Metric] = {
  "rougeL": Metric(rouge("rougeL"), ratio, 1),
  "rouge1": Metric(rouge("rouge1"), ratio, 1),
  "rouge2": Metric(rouge("rouge2"), ratio, 1),
  "bleu": Metric(bleu, bleu_of, 1),
  "chrf": Metric(chrf, chrf_of, 1),
  "token_f1": Metric(token_f1, ratio, 1),
  "exact_match": Metric(exact_match, ratio, 1),
  "length_ratio": Metric(length_ratio, ratio, 0),
  "repetition_rate": Metric(repetition_rate, ratio, -1),
  "copy_rate": Metric(copy_rate, ratio, 0),
}


def _script_words(text: str) -> list[str]:
  """Returns `words` without what is no letter, digit or mark: vowel signs and accents are marks, and part of a word."""
  composed = unicodedata.normalize("NFC", text)
  return words("".join(one if one.isalnum() or unicodedata.category(one)[0] == "M" else " " for one in composed))


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
  found = words(text)
  return [tuple(found[start : start + size]) for start in range(len(found) - size + 1)]


def _answer_words(text: str) -> list[str]:
  bare = text.lower().translate(str.maketrans("", "", string.punctuation))
  return words(re.sub(r"\b(a|an|the)\b", " ", bare))
