"""The command `argot`: large pages for large arrays, then the verb (`scripts/__main__.py`)."""

import os
import sys

# The C library takes every large array anew from the system, page by page, and each page costs a fault: a step that
# works in 3 GB takes 760,000 of 4 KiB. With pages of 2 MiB it takes under 20,000 (README, "Speed on a CPU"). It
# reads the variable when a process starts. glibc 2.35 and later know it, others pass over it.
VARIABLE, PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
FILES = 65_536  # that may be open at a time; a usual limit is 1,024


def environment() -> dict[str, str]:
  """Returns what this process's environment lacks for large pages; nothing where the user has set them, on or off."""
  given = os.environ.get(VARIABLE, "")
  if sys.platform != "linux" or PAGES in given:
    return {}
  return {VARIABLE: ":".join(filter(None, [given, f"{PAGES}=1"]))}


def with_large_pages() -> None:
  """Starts the same command again where its environment lacks them."""
  lacks = environment()
  if lacks and sys.executable:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **lacks})


def with_many_files() -> None:
  """Lets this process open as many files as the system allows it: each file of a text stays open."""
  if sys.platform == "win32":
    return
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
  if soft != resource.RLIM_INFINITY and soft < most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
  """Runs the verb, with large pages."""
  with_large_pages()
  from scripts.__main__ import main as run

  run()
