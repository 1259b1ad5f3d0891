"""What the report's pages are put together from: the document, sections, tables, names."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from train.report_style import STYLE

# A policy that forbids the page to fetch anything, whatever text it holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, header: str, sections: Sequence[str], footer: str) -> str:
  """Returns a whole HTML document.

  Args:
    title: plain text.
    header, sections, footer: HTML; sections that are "" are left out.
  """
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f"<style>{STYLE}</style></head>\n<body>\n{header}\n<main>\n"
    + "\n".join(section for section in sections if section)
    + f"\n</main>\n<footer>{footer}</footer>\n</body></html>\n"
  )


def section(title: str, body: str, note: str) -> str:
  """Returns a section; "" without a body."""
  return f'<section><h2>{title}</h2><p class="note">{note}</p>{body}</section>' if body else ""


def table(heads: Iterable[str], body: str, look: str = "wide") -> str:
  """Returns a table that scrolls by itself where the page is narrow; "" without a body."""
  head = "".join(f"<th>{name}</th>" for name in heads)
  made = f'<table class="{look}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
  return f'<div class="scroll">{made}</div>' if body else ""


def group(title: str, rows: Sequence[str], columns: int, look: str = "group") -> str:
  """Returns rows of a table below a heading of their own; "" without rows."""
  head = f'<tr class="{look}"><th>{escape(title)}</th><td colspan="{columns}"></td></tr>'
  return head + "".join(rows) if rows else ""


def kind_of(stage: Mapping[str, Any]) -> str:
  """Returns "main" or "arm"."""
  return "main" if stage.get("kind", "main") == "main" else "arm"


def name_of(name: str) -> str:
  """Returns a name that may break after its underscores and slashes."""
  return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def when(created: object) -> str:
  """Returns a report's time of making, to be read."""
  return escape(str(created or "–").replace("T", " ").removesuffix("+00:00"))


def pieces(said: Iterable[str]) -> str:
  """Joins short words that do not break inside, only between."""
  return ", ".join(f'<span class="piece">{escape(one)}</span>' for one in said)
