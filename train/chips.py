"""TPU chips: what one of them has and can do.

Figures are those that Google publishes (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e); links are the one-way figures of
"How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), which lie below the published totals.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """One chip.

  Attributes:
    kind: `device_kind` in JAX.
    hbm_gib: memory, GiB.
    peak: bfloat16 FLOP/s of its matrix units.
    hbm_bandwidth: bytes/s.
    link: bytes/s of one link between chips, in one direction.
    clock: Hz; turns the compiler's cycles into seconds. Peak over the FLOPs that the matrix units do in a cycle.
    wraps: chips along a side from which on a slice's side is a ring.
    variant: what libtpu calls the form in which JAX sees one device a chip.
  """

  kind: str
  hbm_gib: float
  peak: float
  hbm_bandwidth: float
  link: float
  clock: float
  wraps: int
  variant: str = "default"


CHIPS: dict[str, Chip] = {
  "v4": Chip("TPU v4", 32, 275e12, 1.228e12, 4.5e10, 1.05e9, 4, "megacore"),
  "v5e": Chip("TPU v5 lite", 16, 197e12, 0.819e12, 4.5e10, 1.5e9, 16),
  "v5p": Chip("TPU v5", 95, 459e12, 2.765e12, 9e10, 1.75e9, 4),
  "v6e": Chip("TPU v6 lite", 32, 918e12, 1.640e12, 9e10, 1.75e9, 16),
}


def peak_of(kind: str) -> float | None:
  """Returns the bfloat16 FLOP/s of a device by its `device_kind`, or None where it is not in `CHIPS`.

  Example:
    >>> peak_of("TPU v4"), peak_of("cpu")
    (275000000000000.0, None)
  """
  return next((chip.peak for chip in CHIPS.values() if chip.kind == kind), None)
