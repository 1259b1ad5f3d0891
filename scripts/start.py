"""The command `argot`: large pages for large arrays, then the verb (`scripts/__main__.py`)."""

import os
import sys

# The C library takes every large array anew from the system, page by page, and each page costs a fault: a step that
# works in 3 GB takes 760,000 of 4 KiB. With pages of 2 MiB it takes 2,500 (README, "Speed on a CPU"). The library reads
# this when a process starts, so the process starts again. glibc 2.35 and later know it, others pass over it.
PAGES = "glibc.malloc.hugetlb"


def environment(given: str = "") -> dict[str, str]:
  """Returns what the environment needs for large pages, beside the tunables that are `given`.

  Example:
    >>> environment("glibc.malloc.check=1")
    {'GLIBC_TUNABLES': 'glibc.malloc.check=1:glibc.malloc.hugetlb=1'}
  """
  return {"GLIBC_TUNABLES": ":".join(filter(None, [given, f"{PAGES}=1"]))}


def main() -> None:
  """Starts again with large pages where they are not set (on Linux), and runs the verb; `hugetlb=0` keeps them off."""
  given = os.environ.get("GLIBC_TUNABLES", "")
  if sys.platform == "linux" and sys.executable and PAGES not in given:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment(given)})
  from scripts.__main__ import main as run

  run()


if __name__ == "__main__":
  main()
