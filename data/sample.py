"""The embedded sample domain: clinical shorthand, made by the project, seeded and offline.

Ward notes such as "72F c/o SOBAR. PMH HTN. sats 84%, HR 70. Rx amox 500mg PO TDS 5/7. R/V GP 2/52. incr fluids." with
two tasks over them: `urgency` is the worst of what the complaint and the vital signs say; `instructions` rewrites the
plan in plain English. The unlabelled corpus is what a ward writes: mostly bare notes, but also letters, handovers and
handbook entries that say the same facts in plain words. The test split uses combinations of drug, frequency and
duration, and of complaint and history, that occur nowhere else.
"""

import ast
import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import sample_tables as words


class Drug(NamedTuple):
  """One prescription, in shorthand and in plain English."""

  short: str
  plain: str


class Case(NamedTuple):
  """A note and the facts behind it.

  Attributes:
    note: shorthand.
    level: 0 routine, 1 urgent, 2 emergency.
    person, complaint, history, findings: in words.
    drugs: prescriptions.
    follow_up: who to see when, in words.
    advice: sentences.
  """

  note: str
  level: int
  person: str
  complaint: str
  history: str
  findings: str
  drugs: list[Drug]
  follow_up: str
  advice: list[str]


def write_domain(
  folder: str | Path, seed: int = 0, documents: int = 8000, train: int = 6000, validation: int = 150, test: int = 250
) -> None:
  """Writes the domain in domain-folder form; the same arguments give the same bytes.

  Args:
    folder: made if missing.
    seed: of everything drawn.
    documents: unlabelled documents, a twentieth of them held out.
    train, validation, test: rows of each task; the two tasks are about different notes.
  """
  folder = Path(folder)
  rng = np.random.default_rng(seed)
  seen: set[str] = set()  # notes of the corpus never come back as rows of a task
  corpus = [{"text": _document(rng, seen)} for _ in range(documents)]
  held = documents // 20
  _write(folder / "corpus.jsonl", corpus[held:])
  _write(folder / "corpus_validation.jsonl", corpus[:held])
  answers: dict[str, Callable[[Case], str]] = {"urgency": lambda c: words.LABELS[c.level], "instructions": instructions}
  for task, answer in answers.items():
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
      cases = [_fresh(rng, seen, held_out=split == "test") for _ in range(rows)]
      _write(folder / task / f"{split}.jsonl", [{"input": case.note, "target": answer(case)} for case in cases])
  template = {"input": "{task}: {input}", "target": "{target}"}
  tasks: dict[str, dict[str, Any]] = {
    "urgency": {"kind": "classification", "instruction": "Say how soon the patient must be seen."},
    "instructions": {"kind": "generation", "instruction": "Write what the patient should do, in plain English."},
  }
  tasks["urgency"]["labels"] = list(words.LABELS)
  for task in tasks.values():
    task["templates"] = [template]  # short: the task's name is prefix enough, and tiny models run on CPUs
  # Last: a folder that has it is complete.
  (folder / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")


def instructions(case: Case) -> str:
  """Returns the plain-English plan: each drug, the follow-up, the advice, in the note's order."""
  return " ".join([*(f"Take {drug.plain}." for drug in case.drugs), f"See {case.follow_up}.", *case.advice])


def draw_case(rng: np.random.Generator, held_out: bool = False) -> Case:
  """Draws a note with its facts; all its combinations are held-out ones, or none is."""
  age, sex = int(rng.integers(19, 93)), _pick(rng, ("F", "M"))
  level = int(rng.integers(3))
  # The complaint alone does not tell: in half of the notes the vital signs are worse.
  complaint_level = level if rng.random() < 0.5 else int(rng.integers(level + 1))
  names, complaint, history_short, history = _complaint(rng, complaint_level, held_out)
  signs, findings = _vitals(rng, level if complaint_level < level else int(rng.integers(level + 1)))
  drugs = [_drug(rng, held_out) for _ in range(1 + (rng.random() < 0.3))]
  who_short, who = _pick(rng, words.FOLLOW_UP)
  when_short, when = _pick(rng, words.VISITS)
  advice = [words.ADVICE[i] for i in rng.permutation(len(words.ADVICE))[: rng.integers(0, 3)]]
  person = _pick(rng, (f"{age}{sex}", f"{age}yo {sex}", f"{sex} {age}"))
  state = [f"PMH {history_short}.", f"{signs}."]
  note = [f"{person} {_pick(rng, words.PRESENT).format(_pick(rng, names))}."]
  note += state if rng.random() < 0.6 else state[::-1]
  note += [f"Rx {', '.join(drug.short for drug in drugs)}."]
  note += [f"{_pick(rng, ('R/V', 'F/U', 'see'))} {_pick(rng, who_short)} {when_short}."]
  return Case(
    note=" ".join([*note, *(f"{_pick(rng, short)}." for short, _ in advice)]),
    level=level,
    person=f"{age} year old {'woman' if sex == 'F' else 'man'}",
    complaint=complaint,
    history=history,
    findings=findings,
    drugs=drugs,
    follow_up=f"{who} in {when}",
    advice=[plain for _, plain in advice],
  )


def _complaint(rng: np.random.Generator, level: int, held_out: bool) -> tuple[tuple[str, ...], str, str, str]:
  while True:
    found, names, plain = _pick(rng, words.COMPLAINTS)
    history_short, history = _pick(rng, words.HISTORY)
    if found == level and is_held_out(names[0], history_short) == held_out:
      return names, plain, history_short, history


def _vitals(rng: np.random.Generator, worst: int) -> tuple[str, str]:
  """Draws two or three vital signs, the worst of them of the given level."""
  chosen = rng.permutation(len(words.VITALS))[: 2 + rng.integers(2)]
  levels = [worst] + [int(rng.integers(worst + 1)) if rng.random() < 0.3 else 0 for _ in chosen[1:]]
  shorts, plains = [], []
  for index, level in zip(chosen, rng.permutation(levels), strict=True):
    names, unit, bands, plain = words.VITALS[index]
    value = _pick(rng, bands[level])
    shorts.append(f"{_pick(rng, names)} {value}{unit}")
    plains.append(f"{plain} {value}")
  return ", ".join(shorts), ", ".join(plains)


def _drug(rng: np.random.Generator, held_out: bool) -> Drug:
  while True:
    names, name, doses, (route_short, route) = _pick(rng, words.DRUGS)
    frequency_short, frequency = _pick(rng, words.FREQUENCIES)
    when_short, when = _pick(rng, words.COURSES)
    if is_held_out(name, frequency_short, when_short) == held_out:
      break
  dose_short, dose = _pick(rng, doses)
  short, plain = f"{dose_short} {route_short} {frequency_short}", f"{name} {dose} {route} {frequency}"
  if rng.random() < 0.2:
    short, plain = f"{short} {words.AS_NEEDED[0]}", f"{plain} {words.AS_NEEDED[1]}"
  return Drug(f"{_pick(rng, names)} {short} {when_short}", f"{plain} for {when}")


def is_held_out(*combination: str) -> bool:
  """Says whether a combination is kept for the test split: about one in eight, by hash."""
  return hashlib.sha256("|".join(combination).encode()).digest()[0] < 32


def _fresh(rng: np.random.Generator, seen: set[str], held_out: bool = False) -> Case:
  while (case := draw_case(rng, held_out)).note in seen:
    pass
  seen.add(case.note)
  return case


def _document(rng: np.random.Generator, seen: set[str]) -> str:
  makers = (_notes, _letter, _handover, _handbook)
  return makers[rng.choice(len(makers), p=(0.2, 0.5, 0.25, 0.05))](rng, seen)


def _notes(rng: np.random.Generator, seen: set[str]) -> str:
  return "\n".join(_fresh(rng, seen).note for _ in range(1 + rng.integers(3)))


def _letter(rng: np.random.Generator, seen: set[str]) -> str:
  """A note, and the letter that goes home with the patient."""
  case = _fresh(rng, seen)
  openings = ("Your medicine is", "You have been given", "Please use")
  drugs = [f"{_pick(rng, openings)} {drug.plain}." for drug in case.drugs]
  visit = f"{_pick(rng, ('You have a visit with', 'We have asked you to see', 'Your next visit is to'))} "
  visit += f"{case.follow_up}."
  heading = _pick(rng, ("Letter home:", "Dear patient,", "Discharge letter."))
  return "\n".join([case.note, heading, " ".join([f"You came with {case.complaint}.", *drugs, visit, *case.advice])])


def _handover(rng: np.random.Generator, seen: set[str]) -> str:
  """A note, and a nurse's words about it."""
  case = _fresh(rng, seen)
  facts = f"{case.person} with {case.complaint}, known for {case.history}, {case.findings}"
  told = f"{facts}: {words.PRIORITY[case.level]}."
  return f"{case.note}\n{_pick(rng, ('Handover:', 'Triage nurse:', 'Told the team:'))} {told}"


def _handbook(rng: np.random.Generator, seen: set[str]) -> str:
  """Entries of the ward's list of abbreviations."""
  del seen
  entries = [*words.FREQUENCIES, words.AS_NEEDED, *words.HISTORY, *words.COURSES, *words.VISITS]
  entries += [(short, name) for names, name, _, _ in words.DRUGS for short in names if short != name]
  entries += [(short, plain) for names, plain in words.FOLLOW_UP for short in names]
  entries += [(short, plain) for _, names, plain in words.COMPLAINTS for short in names]
  entries += [(short, words.PRIORITY[level]) for level, names, _ in words.COMPLAINTS for short in names]
  lines = [f"{short}: {plain}" for short, plain in (entries[i] for i in rng.permutation(len(entries))[:8])]
  return "Ward handbook\n" + "\n".join(lines)


def _pick(rng: np.random.Generator, options: Any) -> Any:
  return options[int(rng.integers(len(options)))]


def _write(file: Path, rows: list[dict[str, str]]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Modules of the standard library with long docstrings; read as text, never imported.
_PROSE = """argparse ast asyncio/events bdb calendar codecs collections/__init__ concurrent/futures/_base configparser
contextlib copy csv ctypes/__init__ dataclasses datetime _pydatetime decimal _pydecimal difflib doctest email/message
email/header enum fractions functools heapq http/client http/cookiejar imaplib inspect ipaddress json/__init__ locale
logging/__init__ mailbox multiprocessing/managers optparse os pathlib pathlib/__init__ pdb pickle pickletools platform
pprint random sched selectors shutil smtplib socket sqlite3/__init__ ssl statistics string subprocess tarfile tempfile
textwrap threading timeit tkinter/__init__ traceback turtle typing unittest/case unittest/mock urllib/request uuid
warnings weakref xml/dom/minidom zipfile zipfile/__init__""".split()


@functools.cache  # reading them takes seconds
def general_texts() -> tuple[list[str], list[str]]:
  """Returns prose that every Python installation carries: its language reference and its docstrings.

  Returns:
    Training and held-out paragraphs; about one in twelve is held out, by hash. They differ a little between versions of
    Python.
  """
  library = Path(sysconfig.get_paths()["stdlib"])
  paragraphs: dict[str, None] = {}
  for file in [library / "pydoc_data" / "topics.py", *(library / f"{name}.py" for name in _PROSE)]:
    if file.exists():
      paragraphs |= dict.fromkeys(_prose(ast.parse(file.read_text(encoding="utf-8"))))
  train, held = [], []
  for text in paragraphs:
    (held if hashlib.sha256(text.encode()).digest()[0] < 21 else train).append(text)
  return train, held


def _prose(tree: ast.AST) -> Iterator[str]:
  """Yields paragraphs of English from a module's long strings; code, tables and grammar are left out."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
      for block in re.split(r"\n\s*\n", node.value):
        text = re.sub(r"\s+", " ", re.sub(r"[*`]+|^\.\. .*$", "", block, flags=re.M)).strip()
        letters = sum(c.isalpha() or c == " " for c in text)
        if 60 <= len(text) <= 1500 and letters > 0.9 * len(text) and text[0].isalpha() and "::=" not in text:
          yield text
