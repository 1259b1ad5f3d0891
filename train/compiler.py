"""What the compiler is asked for beyond its defaults, one table a kind of device, with the reasons.

What the environment says (`XLA_FLAGS`, `LIBTPU_INIT_ARGS`) comes on top.
"""

import ctypes
import sys
from typing import Any

from jax.sharding import Mesh

# Gathers of the next weights go on behind matrix products, fused into them in parts.
_GATHERS = {
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
}
# So do sums of the last gradients; libtpu refuses this beyond v5e.
_SUMS = {"xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true", "xla_enable_async_all_reduce": "true"}


def _vmem(kib: int) -> dict[str, str]:
  """VMEM that one operation may use: with the default of 16 MiB an MLP's products read their weights several times."""
  return {"xla_tpu_scoped_vmem_limit_kib": str(kib)}


# Estimates of llama2-7b's step with v5e's row: 2,226 ms of matrix products with 32 MiB of VMEM, 2,562 with 16.
OPTIONS: dict[str, dict[str, str]] = {
  # Products and sums that XLA gives to the library YNNPACK by default run at half the speed of its own.
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
  "TPU v5 lite": _GATHERS | _SUMS | _vmem(32768),
  "TPU v5": _vmem(49152),  # 32B over 16 x 4: 5,732 ms of products, 6,772 with 16 MiB; gathers stay as they are
  "TPU v6 lite": _GATHERS | _vmem(65536),
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
  """Returns the options for programs on a mesh's devices, by their `device_kind`; None for what the table lacks."""
  return OPTIONS.get(mesh.devices.flat[0].device_kind)


def temporary_bytes(stats: Any, platform: str) -> int:
  """Returns the bytes that a device needs, at the worst moment, beyond a program's arguments and results.

  Args:
    stats: `compiled.memory_analysis()`.
    platform: "cpu", "gpu" or "tpu".
  """
  if platform != "tpu":
    return stats.temp_size_in_bytes
  # There `temp_size` adds up what never lies in memory together: 35 GiB were seen of a program that fits in 32.
  return max(stats.peak_memory_in_bytes - held_bytes(stats), 0)


def held_bytes(stats: Any) -> int:
  """Returns the bytes of a program's arguments and results, what is donated counted once; `stats` as above."""
  return stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def return_memory() -> None:
  """Gives the system back what the compiler has freed: the C library keeps it, 350 MiB after a small T5's step."""
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; musl has none
    if trim:
      trim(0)
