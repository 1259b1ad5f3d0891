"""Rows of the families' tables: which of our parameters is which tensor of theirs, and how its dims lie."""

import re
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
  """One of our parameters, and where it is in a Hugging Face folder.

  Attributes:
    ours: path in the parameters; stacked where it has `layers/`.
    theirs: name of the tensor, with `{}` for the layer's number.
    form: `"their dims -> our dims of one layer"`; without an arrow they are the same.
    part: (number, count) where their tensor is several of ours side by side along its last dim.
  """

  ours: str
  theirs: str
  form: str
  part: tuple[int, int] = (0, 1)

  @property
  def stacked(self) -> bool:
    """Whether ours holds all layers, on axis 0."""
    return "layers/" in self.ours

  def layers(self, shape: tuple[int, ...]) -> int:
    """Returns how many of their tensors a parameter of ours with this shape is."""
    return shape[0] if self.stacked else 1

  def dims(self, shape: tuple[int, ...]) -> "Dims":
    """Returns the dims of one layer of a parameter with this shape."""
    left, _, right = self.form.partition(" -> ")
    groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", left))
    letters = (right or left).replace("(", "").replace(")", "").split()
    return Dims(groups, dict(zip(letters, shape[1:] if self.stacked else shape, strict=True)), self.part[1])


class Dims(NamedTuple):
  """A row's dims.

  Attributes:
    groups: the letters of each of their dims; the vocabulary V is always the first.
    sizes: letter -> size, in our order.
    parts: how many of ours lie side by side along their last dim.
  """

  groups: tuple[tuple[str, ...], ...]
  sizes: dict[str, int]
  parts: int

  @property
  def order(self) -> list[int]:
    """Which of our dims each of their letters is."""
    return [list(self.sizes).index(letter) for group in self.groups for letter in group]

  def split(self, vocab_size: int) -> list[list[int]]:
    """Returns the sizes of the letters in each of their dims, with so many rows of vocabulary."""
    sizes = {**self.sizes, "V": vocab_size}
    return [[sizes[letter] for letter in group] for group in self.groups]

  def shape(self, vocab_size: int) -> tuple[int, ...]:
    """Returns the shape of their tensor."""
    shape = [int(np.prod(group)) for group in self.split(vocab_size)]
    return (*shape[:-1], shape[-1] * self.parts)
