"""Metrics of labels and of generated text, from kept libraries: scikit-learn, rouge-score and sacrebleu.

Every score is a share from 0 to 1 (not a percentage), but for `length_ratio`; `n` counts examples. A metric is first
made into parts, a few numbers an example; its value is a function of the parts' sums. So a corpus metric such as BLEU
is its published value, and intervals (train/statistics.py) need nothing but other sums of the same parts. Parts are
float64 [n,K], sums are [...,K], values [...].
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.label_sets import from_text

if TYPE_CHECKING:
  from data.tasks import Task

Texts = Sequence[str]
Rows = Sequence[Mapping[str, str]]
_REPEATED = 4  # words in an n-gram whose repetition is counted
_COPIED = 3  # words in an n-gram that counts as copied
_CHARACTERS = 6  # the longest n-gram of chrF
_WORD = re.compile("[a-z0-9]+")  # of ROUGE
_CHARACTER = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese and Japanese have no spaces: a character is a word
_BETA = 2.0  # chrF: recall weighs beta times as much as precision


def ratio(sums: np.ndarray) -> np.ndarray:
  """Returns the first sum by the second, 0 where the second is 0: a mean, where the second part is 1.

  Example:
    >>> ratio(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [0.75, 0.0]
  """
  return np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1e-300), 0.0)


def perplexity_of(sums: np.ndarray) -> np.ndarray:
  """Returns exp(nats by target tokens), from the sums of both."""
  return np.exp(np.minimum(ratio(sums), 700.0))


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
    return _means(scorer.score(target, output)[name].fmeasure for output, target in zip(outputs, targets, strict=True))

  return parts


def exact_match(outputs: Texts, targets: Texts, inputs: Texts) -> np.ndarray:
  """Makes the parts of the share of equal texts, white space around them aside."""
  return _means(output.strip() == target.strip() for output, target in zip(outputs, targets, strict=True))


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

  return _means(one(output, target) for output, target in zip(outputs, targets, strict=True))


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
# How `config.evaluate` may have generated text written -> what it is where nothing is asked for; else it is stored
# beside the metrics.
DECODING = {"beams": 1, "length_penalty": 1.0, "repetition_penalty": 1.0, "candidates": 1, "temperature": 1.0}
# Headline -> its value, from sums of parts.
VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "accuracy": ratio,
  "micro_f1": ratio,
  "perplexity": perplexity_of,
  **{name: metric.value for name, metric in GENERATION.items()},
}


def headline(kind: str, names: Sequence[str] = ()) -> str:
  """Returns the metric that is a skill's `value`.

  Args:
    kind: "classification", "multi_label", "generation" or "perplexity".
    names: a generation task's `metrics`.

  Raises:
    ValueError: see `chosen`.
  """
  fixed = {"classification": "accuracy", "multi_label": "micro_f1", "perplexity": "perplexity"}
  return fixed.get(kind) or chosen(names)[0]


def higher_is_better(name: str) -> bool:
  """Says whether more of a headline is better."""
  return name != "perplexity" and (name in ("accuracy", "micro_f1") or GENERATION[name].better > 0)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
  """Returns the metrics of generated text that a task asks for, the headline first; all where it names none.

  Raises:
    ValueError: an unknown name, one that comes twice, or a headline of which neither more nor less is better.
  """
  known = list(GENERATION)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"`metrics` names {unknown}; known are {known}")
  if len(set(names)) < len(names):
    raise ValueError(f"`metrics` names one twice: {list(names)}")
  if names and not GENERATION[names[0]].better:
    judges = [name for name in known if GENERATION[name].better]
    raise ValueError(f"`metrics` begins with {names[0]!r}, which only describes; put one of {judges} first")
  return tuple(names) or tuple(known)


def check_metrics(task: "Task") -> None:
  """Checks the metrics that a task names.

  Raises:
    ValueError: see `chosen`; a classification task that names some.
  """
  if task.kind != "generation" and task.metrics:
    raise ValueError(f"task {task.name!r}: `metrics` are for generation; classification has its own, leave them out")
  try:
    chosen(task.metrics)
  except ValueError as error:
    raise ValueError(f"task {task.name!r}: {error}") from error


def generation_metrics(
  outputs: Texts, targets: Texts, inputs: Texts, names: Sequence[str] = ()
) -> tuple[dict[str, Any], np.ndarray]:
  """Measures generated text against one reference each.

  Args:
    outputs: one text an example.
    targets: the references.
    inputs: what was asked about, for `copy_rate`.
    names: the metrics, headline first; none = all of `GENERATION`.

  Returns:
    Metric -> value, and `n`; and the headline's parts, float64 [n,K].

  Raises:
    ValueError: no examples, unequal numbers of them, or see `chosen`.

  Example:
    >>> generation_metrics(["take two"], ["take two"], ["x"], ["exact_match"])[0]
    {'exact_match': 1.0, 'n': 1}
  """
  _check(outputs, targets)
  parts = {name: GENERATION[name].parts(outputs, targets, inputs) for name in chosen(names)}
  values = {name: float(GENERATION[name].value(found.sum(axis=0))) for name, found in parts.items()}
  return {**values, "n": len(targets)}, next(iter(parts.values()))


def classification_metrics(predictions: Texts, targets: Texts, labels: Texts) -> tuple[dict[str, Any], np.ndarray]:
  """Measures labels.

  Args:
    predictions: one label an example.
    targets: the right ones.
    labels: every label of the task, in its order.

  Returns:
    `accuracy` and `macro_f1` (0 to 1; the latter over labels that occur in targets or predictions), `per_class` (label
    -> `precision`, `recall`, `f1`, each 0 where it is not defined, and `n`, its targets), `confusion` (counts; rows are
    targets and columns predictions, in the order of `labels`), `n`; and the parts of accuracy, float64 [n,2].

  Raises:
    ValueError: no examples, unequal numbers of them, or a label that is not one of `labels` (it would have no row in
      the confusion, and an example would be lost without a word).

  Reference:
    `sklearn.metrics.precision_recall_fscore_support` and `f1_score(average="macro", zero_division=0)`.

  Example:
    >>> classification_metrics(["a", "a"], ["a", "b"], ["a", "b"])[0]["confusion"]
    [[1, 0], [1, 0]]
  """
  from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

  _check(predictions, targets)
  for role, values in (("targets", targets), ("predictions", predictions)):
    if unknown := sorted(set(values) - set(labels)):
      raise ValueError(
        f"classification metrics expect {role} among the task's labels {list(labels)}, got {unknown[:5]}; "
        "add them to the labels or mend the rows"
      )
  columns = precision_recall_fscore_support(targets, predictions, labels=list(labels), zero_division=0)
  names = ("precision", "recall", "f1", "n")
  per_class = {
    label: dict(zip(names, (*map(float, row[:3]), int(row[3])), strict=True))
    for label, row in zip(labels, zip(*columns, strict=True), strict=True)
  }
  occurring = {*predictions, *targets}
  parts = accuracy_parts(predictions, targets)
  metrics = {
    "accuracy": float(ratio(parts.sum(axis=0))),
    "macro_f1": float(np.mean([found["f1"] for label, found in per_class.items() if label in occurring])),
    "per_class": per_class,
    "confusion": confusion_matrix(targets, predictions, labels=list(labels)).tolist(),
    "n": len(targets),
  }
  return metrics, parts


def multi_label_metrics(outputs: Texts, targets: Texts, labels: Texts) -> tuple[dict[str, Any], np.ndarray]:
  """Measures sets of labels.

  Args:
    outputs: one set an example, as text (data/label_sets.py); what is no label in it is passed over.
    targets: the right ones.
    labels: every label of the task, in its order.

  Returns:
    `micro_f1` (of all decisions together), `macro_f1` (of each label that occurs in targets or outputs, their mean),
    `subset_accuracy` (the share of examples whose set is right as a whole), `hamming_loss` (the share of decisions,
    one for each label of each example, that are wrong), `per_class` (label -> `precision`, `recall`, `f1`, each 0 where
    it is not defined, and `n`, its targets), `n` examples; and the parts of micro-F1, float64 [n,2].

  Raises:
    ValueError: no examples, or unequal numbers of them.

  Reference:
    scikit-learn's `f1_score` (zero_division=0), `accuracy_score` and `hamming_loss` of indicator matrices.

  Example:
    >>> multi_label_metrics(["a, b", "none"], ["a", "none"], ["a", "b"])[0]["subset_accuracy"]
    0.5
  """
  from sklearn.metrics import precision_recall_fscore_support

  _check(outputs, targets)
  found, right = (indicators(texts, labels) for texts in (outputs, targets))
  columns = precision_recall_fscore_support(right, found, average=None, zero_division=0)
  names = ("precision", "recall", "f1", "n")
  per_class = {
    label: dict(zip(names, (*map(float, row[:3]), int(row[3])), strict=True))
    for label, row in zip(labels, zip(*columns, strict=True), strict=True)
  }
  parts = np.stack([2.0 * (found & right).sum(axis=1), found.sum(axis=1) + right.sum(axis=1)], axis=1)
  occurring = (found | right).any(axis=0)
  f1 = [one["f1"] for one, occurs in zip(per_class.values(), occurring, strict=True) if occurs]
  metrics = {
    "micro_f1": float(ratio(parts.sum(axis=0))),
    "macro_f1": float(np.mean(f1)) if f1 else 0.0,
    "subset_accuracy": float((found == right).all(axis=1).mean()),
    "hamming_loss": float((found != right).mean()),
    "per_class": per_class,
    "n": len(targets),
  }
  return metrics, parts


def indicators(texts: Texts, labels: Texts) -> np.ndarray:
  """Returns bool [n, labels]: which labels stand in each text; what is no label is passed over."""
  return np.array([[label in from_text(text, labels, "")[0] for label in labels] for text in texts], bool)


def accuracy_parts(predictions: Sequence[Any], targets: Sequence[Any]) -> np.ndarray:
  """Returns float64 [n,2]: 1 where a prediction is right, and 1."""
  return _means(p == t for p, t in zip(predictions, targets, strict=True))


# Task kind -> (outputs, rows, the task's labels, the task's metrics) -> metrics, and the headline's parts.
METRICS: dict[str, Callable[[Texts, Rows, Texts, Texts], tuple[dict[str, Any], np.ndarray]]] = {
  "classification": lambda outputs, rows, labels, _: classification_metrics(outputs, column(rows, "target"), labels),
  "multi_label": lambda outputs, rows, labels, _: multi_label_metrics(outputs, column(rows, "target"), labels),
  "generation": lambda outputs, rows, _, names: generation_metrics(
    outputs, column(rows, "target"), column(rows, "input"), names
  ),
}


def column(rows: Rows, field: str) -> list[str]:
  """Returns one field of every row.

  Example:
    >>> column([{"input": "a"}, {"input": "b"}], "input")
    ['a', 'b']
  """
  return [row[field] for row in rows]


def _means(scores: Any) -> np.ndarray:
  return np.array([[float(score), 1.0] for score in scores])


def words(text: str) -> list[str]:
  """Returns what stands between white space, in lower case, and each Chinese or Japanese character.

  Example:
    >>> words("Take 2 每天")
    ['take', '2', '每', '天']
  """
  return _CHARACTER.sub(r" \g<0> ", text.lower()).split()


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


def _check(predictions: Texts, targets: Texts) -> None:
  if not targets or len(predictions) != len(targets):
    raise ValueError(f"metrics need one prediction for each target, got {len(predictions)} and {len(targets)}")
