"""Several labels for one text: how a set of labels is written as an answer, and read again.

The answer is the labels in the task's order, joined by ", ", or the task's word for none. So a set has one answer, and
an answer one set.
"""

from collections.abc import Collection, Sequence
from typing import Any

JOINT = ", "


def as_text(chosen: Collection[str], labels: Sequence[str], none: str) -> str:
  """Returns the answer for a set of labels.

  Args:
    chosen: some of the labels.
    labels: every label, in the task's order.
    none: the answer for no label.

  Example:
    >>> as_text({"cold", "asthma"}, ["asthma", "copd", "cold"], "none"), as_text([], ["a", "b"], "none")
    ('asthma, cold', 'none')
  """
  return JOINT.join(label for label in labels if label in chosen) or none


def from_text(text: str, labels: Sequence[str], none: str) -> tuple[frozenset[str], bool]:
  """Reads an answer.

  Returns:
    The labels in it, and whether it is nothing but labels, each once, or the word for none.

  Example:
    >>> from_text("cold, ill", ["asthma", "cold"], "none")
    (frozenset({'cold'}), False)
  """
  parts = [] if text.strip() == none else [part.strip() for part in text.split(JOINT.strip())]
  found = frozenset(parts) & frozenset(labels)
  return found, len(found) == len(parts)


def target_of(value: Any, labels: Sequence[str], none: str, separator: str) -> str:
  """Returns the answer for a row's target.

  Args:
    value: a list of labels; or text: labels with `separator` between them, and for no label "" or `none`.
    labels: every label, in the task's order.
    none: the answer for no label.
    separator: between labels in text, as in a column of a CSV file.

  Raises:
    ValueError: something else, a label that is none of the task's, or one that stands twice.

  Example:
    >>> target_of(["cold", "asthma"], ["asthma", "cold"], "none", "|"), target_of("", ["asthma", "cold"], "none", "|")
    ('asthma, cold', 'none')
  """
  if isinstance(value, str):
    value = [] if value.strip() in ("", none) else [part.strip() for part in value.split(separator)]
  if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
    raise ValueError(f"field 'target' must be a list of labels, or text with {separator!r} between them, got {value!r}")
  if unknown := [part for part in value if part not in labels]:
    raise ValueError(f"a label is none of {list(labels)}, got {unknown[0]!r}; add it to tasks.json or mend the row")
  if twice := [part for part in value if value.count(part) > 1]:
    raise ValueError(f"a label stands twice, got {twice[0]!r}; mend the row")
  return as_text(value, labels, none)
