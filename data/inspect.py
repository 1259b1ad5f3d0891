"""What may be wrong with a user's data, found before a long run: rows, labels, tokens, overlap of training and test.

Every check yields findings and reads on after a fault.
"""

import contextlib
import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.cache import cache_folder
from data.features import Layout
from data.files import SUFFIXES
from data.label_sets import from_text
from data.prompts import frame_of, nested_labels, render, same_labels
from data.rows import BadRow, Rows
from data.sources import Texts, open_rows, string_field, texts_of
from data.tasks import SPLITS, Domain, Task, TaskRows, data_file, folder_task, hold_out, read_task_rows, task_table
from data.tokenizer import Tokenizer
from data.words import words

SHOWN = 3  # places named of each kind of fault
ENCODED = 2000  # texts of each source that are encoded
LOOKED_AT = 20_000  # rows or documents that are encoded or compared, of each file; the rest are only parsed
MANY_LEFT_OUT = 0.05  # share of a task's rows, truncated or skipped for their length
UNKNOWN, MANY_UNKNOWN = 0.001, 0.05  # share of unknown tokens
MANY_TESTED = 0.05  # share of test inputs that are trained on
SHINGLE, NEAR = 8, 0.8  # words in a shingle; share of a text's shingles in the training data that makes it a near copy
MANY_NEAR = 0.1  # share of near copies in a test
BROKEN_TEXT = 0.001  # share of documents with replacement or control characters
RARE = 0.01  # share of a label in the training rows


Placed = tuple[Callable[[], str], str]  # what says where a text stands, and the text


class Finding(NamedTuple):
  """Something that a user should know.

  Attributes:
    severity: "error" (a run would stop or be wrong), "warning" or "info".
    where: file and line, task or stage.
    what: what was found, with numbers.
    fix: what to do; empty for infos that need nothing.
  """

  severity: str
  where: str
  what: str
  fix: str = ""


def read_folder(config: ConfigDict, folder: Path, findings: list[Finding]) -> Domain:
  """Reads whatever of a domain folder can be read, and adds a finding for everything that cannot.

  Returns:
    The domain, with the rows that can be used.
  """
  cache = cache_folder(config.data.cache_dir)
  severity = "error" if config.data.bad_rows == "error" else "warning"

  def attempt(where: str, run):
    try:
      return run()
    except (ValueError, OSError) as error:
      findings.append(Finding("error", where, str(error), "mend or add this part; README, 'Your own domain'"))
      return None

  def texts(stem: str, needed: bool) -> Texts | None:
    file = attempt(str(folder), lambda: data_file(folder, stem))
    if file is None:
      if needed:
        findings.append(Finding("error", f"{folder / stem}.jsonl", "the file is missing", 'write {"text": …} lines'))
      return None
    rows = attempt(file, lambda: open_rows(file, cache))
    if rows is None:
      return None
    findings.extend(bad_rows(rows, lambda i: string_field(rows.read(i), "text"), severity))
    if not len(rows):
      findings.append(Finding("error", file, "it holds no documents", 'write {"text": …} lines'))
    return Texts(rows, bad_rows="skip")

  corpus, held_out = texts("corpus", True) or texts_of([]), texts("corpus_validation", False)
  if held_out is None:
    corpus, held_out = attempt(str(folder / "corpus"), lambda: hold_out(corpus, "the corpus")) or (corpus, corpus)
  tasks = {}
  table = attempt(str(folder / "tasks.json"), lambda: task_table(folder)) or {}
  made = {name: attempt(f"task {name}", lambda name=name: folder_task(folder, name, table[name])) for name in table}
  for name, fields in config.tasks.to_dict().items():
    made[name] = attempt(f"task {name}", lambda name=name, fields=fields: Task.from_dict(name, fields, "config.tasks"))
  findings.extend(unread(folder, {name: task for name, task in made.items() if task}, set(made)))
  for name, task in made.items():
    if task:
      tasks[name] = task_with_good_rows(task, config, severity, attempt, findings)
  return Domain(folder.name, corpus, held_out, {name: task for name, task in tasks.items() if "train" in task.files})


def unread(folder: Path, tasks: Mapping[str, Task], named: Collection[str]) -> Iterator[Finding]:
  """Files that look like a part of the domain and are none: a split by another name, a folder that is no task.

  Args:
    folder: the domain folder.
    tasks: those that could be made.
    named: names of all tasks, also of those that could not.
  """
  suffixes = (*SUFFIXES, ".json")
  for inner in sorted(path for path in folder.glob("*") if path.is_dir()):
    files = {file.name: str(file) for file in sorted(inner.iterdir()) if file.name.endswith(suffixes)}
    if inner.name in tasks:
      used = tasks[inner.name].files.values()
      if all(isinstance(source, str) for source in used) and (left := {n for n, f in files.items() if f not in used}):
        what = f"nothing reads {sorted(left)}; read are {sorted(Path(source).name for source in used)}"
        fix = f"the splits are {', '.join(SPLITS)}, in files that end in {', '.join(SUFFIXES)}: rename, or move it away"
        yield Finding("warning", str(inner), what, fix)
    elif inner.name not in named and any(name.partition(".")[0] in SPLITS for name in files):
      what = f"nothing reads {sorted(files)}: tasks.json has no task {inner.name!r}, it has {sorted(named)}"
      yield Finding("warning", str(inner), what, "name the task there, or move the folder away")


def task_with_good_rows(task: Task, config: ConfigDict, severity: str, attempt, findings: list[Finding]) -> Task:
  """Checks every row of a task's splits; returns the task with the splits that have rows, bad ones skipped."""
  files = {}
  for split in ("train", "validation", "test"):
    where = f"task {task.name}, {split}"
    if split not in task.files:
      if split != "validation":
        findings.append(Finding("error", where, "the split is missing", f"write {task.name}/{split}.jsonl"))
      continue
    rows = attempt(where, lambda split=split: open_rows(task.files[split], cache_folder(config.data.cache_dir)))
    if rows is None:
      continue
    checked = TaskRows(task, rows)
    bad = list(bad_rows(checked, checked.read, severity))
    findings.extend(bad)
    if not len(rows) or all(_broken(checked, i) for i in range(len(rows))):
      findings.append(Finding("error", where, "no row can be used", 'write {"input": …, "target": …} lines'))
    else:
      files[split] = task.files[split]
  return dataclasses.replace(task, files=files, cache=config.data.cache_dir, bad_rows="skip")


def _broken(rows: Rows, number: int) -> bool:
  try:
    rows.read(number)
  except BadRow:
    return True
  return False


def bad_rows(rows: Rows, read, severity: str) -> Iterator[Finding]:
  """Yields a finding for each reason for which rows cannot be used."""
  places: dict[str, list[str]] = defaultdict(list)
  counts: Counter[str] = Counter()
  for number in range(len(rows)):
    try:
      read(number)
    except ValueError as error:
      bad = error if isinstance(error, BadRow) else BadRow(rows.where(number), str(error))
      counts[bad.reason] += 1
      if counts[bad.reason] <= SHOWN:
        places[bad.reason].append(str(bad))
  for reason, count in counts.items():
    rest = f" and {count - SHOWN} more" if count > SHOWN else ""
    fix = "mend the rows, or set data.bad_rows to 'skip'" if severity == "error" else "they are skipped and counted"
    yield Finding(severity, places[reason][0].split(": ")[0], f"{'; '.join(places[reason])}{rest}", fix)


def labels(task: Task, tokenizer: Tokenizer) -> Iterator[Finding]:
  """Labels that collide in tokens, begin one another, never occur, or are rare."""
  if task.kind == "generation":
    return
  where = f"task {task.name}"
  for same in same_labels(task, tokenizer):
    yield Finding("error", where, f"labels {same} are the same tokens", "rename one: they cannot be told apart")
  for shorter, longer in nested_labels(task, tokenizer):
    yield Finding("info", where, f"in tokens, label {shorter!r} begins label {longer!r}; EOS tells them apart")
  counts = Counter(labels_in(task, "train"))
  if missing := [label for label in task.labels if not counts[label]]:
    tested = {label for split in task.files if split != "train" for label in labels_in(task, split)}
    asked = f"; {sorted(set(missing) & tested)} are tested" if set(missing) & tested else ""
    what = f"labels without a training row: {missing}{asked}"
    yield Finding("warning", where, what, "add rows, or take the labels out of tasks.json")
  total = len(read_task_rows(task, "train"))
  if rare := {label: n for label, n in counts.items() if n < RARE * total}:
    yield Finding("info", where, f"labels with under {RARE:.0%} of the {total:,} training rows: {rare}")


def labels_in(task: Task, split: str) -> Iterator[str]:
  """Yields every label of every row of a split."""
  for row in read_task_rows(task, split):
    several = task.kind == "multi_label"
    yield from sorted(from_text(row["target"], task.labels, task.none)[0]) if several else [row["target"]]


def lengths(task: Task, tokenizer: Tokenizer, layout: Layout, overlong: str, room: int) -> Iterator[Finding]:
  """Rows too long for a batch's rows, prompts and answers that are cut when they are asked, answers without a token.

  Args:
    task, tokenizer, layout, overlong: see `inspect_tasks`.
    room: most tokens of a generated answer.
  """
  frame = frame_of(task, tokenizer)
  framing = len(frame.prompt([], 0)), len(frame.answer([]))
  for split in task.files:
    rows = read_task_rows(task, split)
    for template in range(len(task.templates)):
      blocks = (rows[at : at + LOOKED_AT] for at in range(0, len(rows), LOOKED_AT))
      prompts, answers = np.concatenate([sizes(task, template, block, tokenizer) for block in blocks], axis=1)
      where = f"task {task.name}, {split}" + (f", template {template}" if len(task.templates) > 1 else "")
      empty = np.flatnonzero(answers == 0)
      if len(empty):
        what = f"{len(empty):,} rows whose answer has no token, such as {rows.where(int(empty[0]))}"
        yield Finding("error", where, what, "their targets are nothing to this tokenizer; mend them or take another")
      if task.kind == "generation" and (said := cut_answers(answers, room)):
        severity = "warning" if (answers > room).mean() > MANY_LEFT_OUT else "info"
        yield Finding(severity, where, said, "raise config.evaluate.max_new_tokens")
      row = layout.encoder_length if layout.architecture == "t5" else layout.decoder_length
      if layout.architecture == "gpt":  # the answer is in the same row
        written = answers + framing[1] if task.labels else np.full_like(answers, room)
        row -= answers + framing[1] if split == "train" else np.minimum(written.max(initial=0), row // 2)
      long = prompts + framing[0] > row
      done = "cut in evaluation"
      if split == "train":
        long |= answers + framing[1] > layout.decoder_length
        done = {"error": "refused", "skip": "skipped", "truncate": "cut (prompts) or skipped (answers)"}[overlong]
      if long.any():
        first, share = int(long.argmax()), long.mean()
        severity = "error" if done == "refused" else "warning" if share > MANY_LEFT_OUT else "info"
        what = f"{long.sum():,} of {len(long):,} rows ({share:.1%}) are longer than a row and are {done}; "
        what += f"first {rows.where(first)}: {prompts[first]} + {answers[first]} tokens"
        yield Finding(severity, where, what, "raise data.encoder_length / data.decoder_length, or see data.overlong")


def cut_answers(answers: np.ndarray, room: int) -> str:
  """Says how many right answers a model could not write whole, "" = none, by their tokens, int [rows]."""
  cut = int((answers > room).sum())
  most = f"config.evaluate.max_new_tokens={room} and would be cut: the longest has {answers.max()} tokens"
  return f"{cut:,} of {len(answers):,} right answers are longer than {most}" if cut else ""


def sizes(task: Task, template: int, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> np.ndarray:
  """Returns the tokens of rows' prompts and answers, int [2,rows]."""
  pairs = [render(task, row, template) for row in rows]
  return np.array([[len(ids) for ids in tokenizer.encode_batch(part)] for part in zip(*pairs, strict=True)])


def special_strings(name: str, texts: Iterable[Placed], tokenizer: Tokenizer) -> Iterator[Finding]:
  """Names of special tokens in users' text."""
  names = {*tokenizer.special_strings(), *(f"<extra_id_{i}>" for i in range(3))}
  pattern = re.compile("|".join(re.escape(text) for text in sorted(names, key=len, reverse=True)) + r"|<extra_id_\d+>")
  found = [(where, match[0]) for where, text in texts if (match := pattern.search(text))]
  if found:
    shown = ", ".join(f"{token!r} in {where()}" for where, token in found[:SHOWN])
    what = f"{len(found):,} texts hold the name of a special token: {shown}; it stays text and is no special token"
    yield Finding("warning", name, what, "take it out if it is left over from another preparation")


def tokens(name: str, texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Finding]:
  """Unknown tokens, bytes a token, and texts that do not come back from their tokens."""
  encoded = tokenizer.encode_batch(texts)
  total, size = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
  unknown = sum(ids.count(tokenizer.unk_id) for ids in encoded) if tokenizer.unk_id is not None else 0
  share = unknown / max(total, 1)
  if unknown and share > UNKNOWN:
    first = next(text for text, ids in zip(texts, encoded, strict=True) if tokenizer.unk_id in ids)
    what = f"{share:.1%} of the tokens are unknown, first in {first[:60]!r}"
    severity = "error" if share > MANY_UNKNOWN else "warning"
    yield Finding(severity, name, what, "take a tokenizer with byte fallback, or tokenizer.path='train'")
  changed = [text for text, ids in zip(texts, encoded, strict=True) if tokenizer.decode(ids).split() != text.split()]
  what = f"{size / max(total, 1):.2f} bytes a token, {share:.2%} unknown"
  if changed:
    what += f"; {len(changed):,} of {len(texts):,} texts do not come back whole from their tokens, such as "
    what += f"{changed[0][:60]!r} as {tokenizer.decode(tokenizer.encode(changed[0]))[:60]!r}"
  yield Finding("info", name, what)


_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|Ã[\x80-\xbf©¨¼¶¤]|â€")


def text_quality(name: str, texts: Iterable[Placed]) -> Iterator[Finding]:
  """Replacement and control characters, and signs of text decoded wrongly."""
  total, broken = 0, []
  for where, text in texts:
    total += 1
    if match := _BROKEN.search(text):
      broken.append((match[0], where))
  if broken:
    severity = "warning" if len(broken) > BROKEN_TEXT * total else "info"
    what = f"{len(broken):,} of {total:,} texts hold broken characters: "
    what += ", ".join(f"{character!r} in {where()}" for character, where in broken[:SHOWN])
    yield Finding(severity, name, what, "decode the source as UTF-8 again")


def contradictions(task: Task) -> Iterator[Finding]:
  """Equal training inputs with different labels."""
  if task.kind != "classification":
    return
  rows, seen = read_task_rows(task, "train"), {}
  found = []
  for number, row in enumerate(rows):
    first = seen.setdefault(identity(row["input"]), (number, row["target"]))
    if first[1] != row["target"]:
      found.append((*first, number, row["target"]))
  if found:
    pairs = [f"{rows.where(a)} ({one!r}) and {rows.where(b)} ({other!r})" for a, one, b, other in found[:SHOWN]]
    what = f"{len(found):,} training inputs have two labels: {'; '.join(pairs)}"
    yield Finding("warning", f"task {task.name}", what, "keep the right one")


class Known:
  """Training texts, to look others up in.

  Attributes:
    whole: `identities` of all of them.
    partly: near copies are found of the first `LOOKED_AT` only, which are not all.
  """

  def __init__(self, rows: Rows, field: str):
    self.partly = len(rows) > LOOKED_AT
    self.whole = identities(rows, field)
    pools = (shingles(text) for _, text in placed(rows, field))
    self._pool = np.unique(np.concatenate([np.zeros(0, np.uint64), *pools]))

  def near(self, text: str) -> bool:
    """Says whether `NEAR` of a text's shingles (runs of `SHINGLE` words) are there."""
    own = shingles(text)
    if len(own) < 2 or not len(self._pool):
      return False
    places = np.minimum(np.searchsorted(self._pool, own), len(self._pool) - 1)
    return float((self._pool[places] == own).mean()) >= NEAR


def overlap(name: str, known: Known, rows: Rows, field: str, tested: bool = True) -> Iterator[Finding]:
  """Test texts that stand in the training data, exactly or nearly.

  Args:
    name: of the test.
    known: training texts.
    rows: of the test.
    field: whose text is looked up.
    tested: a copy gives the answer away; False: it stands in unlabelled text only.
  """
  exact = same(known.whole, rows, field)
  near = [where for where, text in placed(rows, field) if identity(text) not in known.whole and known.near(text)]
  if len(rows) > LOOKED_AT or known.partly:
    yield Finding("info", name, f"near copies were looked for in the first {LOOKED_AT:,} rows alone, exact ones in all")
  for kind, found, many in (("the same text", exact, MANY_TESTED), ("nearly the same text", near, MANY_NEAR)):
    if found:
      looked_at = len(rows) if found is exact else min(len(rows), LOOKED_AT)
      share = len(found) / looked_at
      severity = "warning" if tested and (found is exact or share > many) else "info"
      if tested and found is exact and share > many:
        severity = "error"
      what = f"{len(found):,} of {looked_at:,} ({share:.1%}) have {kind} in training, such as {found[0]()}"
      yield Finding(severity, name, what, "split again by document, without copies" if severity != "info" else "")


def copied(task: Task) -> str:
  """Says how many test inputs a task also trains on, but for case and spaces; "" = none."""
  rows = read_task_rows(task, "test")
  found = same(identities(read_task_rows(task, "train"), "input"), rows, "input")
  return f"{len(found):,} of {len(rows):,} test inputs are trained on, too, such as {found[0]()}" if found else ""


def identities(rows: Rows, field: str) -> set[int]:
  """Returns the `identity` of all texts that can be used."""
  return {identity(text) for _, text in placed(rows, field, len(rows))}


def same(known: Set[int], rows: Rows, field: str) -> list[Callable[[], str]]:
  """Returns what says the places of texts whose `identity` is known."""
  return [where for where, text in placed(rows, field, len(rows)) if identity(text) in known]


def identity(text: str) -> int:
  """Returns a hash of a text without case and runs of spaces."""
  return hash(" ".join(text.lower().split()))


def shingles(text: str) -> np.ndarray:
  """Returns hashes of a text's runs of `SHINGLE` words; of a shorter text one, of all its words. uint64."""
  hashes = np.array([hash(word) & 0xFFFFFFFFFFFFFFFF for word in words(text)], np.uint64)
  size = min(SHINGLE, len(hashes))
  count = len(hashes) - size + 1
  mixed = np.zeros(count if len(hashes) else 0, np.uint64)
  for offset in range(size):
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
  return mixed


def placed(rows: Rows, field: str, limit: int = LOOKED_AT) -> Iterator[Placed]:
  """Yields the texts of the first rows that can be used, each with a function that says its place."""
  for number in range(min(len(rows), limit)):
    with contextlib.suppress(ValueError):
      yield functools.partial(rows.where, number), string_field(rows.read(number), field)


def inspect_texts(domain: Domain, sources: Mapping[str, Texts], tokenizer: Tokenizer) -> Iterator[Finding]:
  """Runs the checks of unlabelled text."""
  for name, texts in {"corpus": domain.corpus, "corpus_validation": domain.corpus_test, **sources}.items():
    found = list(placed(texts.rows, "text"))
    yield from special_strings(name, found, tokenizer)
    yield from text_quality(name, found)
    if found:
      yield from tokens(name, [text for _, text in found[:ENCODED]], tokenizer)


def inspect_tasks(domain: Domain, tokenizer: Tokenizer, layout: Layout, overlong: str, room: int) -> Iterator[Finding]:
  """Runs the checks of the tasks, and of what of the tests was seen in training.

  Args:
    domain: tasks and corpus.
    tokenizer: the tokenizer.
    layout: of a batch.
    overlong: `config.data.overlong`.
    room: `config.evaluate.max_new_tokens`.
  """
  corpus = Known(domain.corpus.rows, "text")
  yield from overlap("corpus_validation", corpus, domain.corpus_test.rows, "text")
  for task in domain.tasks.values():
    yield from labels(task, tokenizer)
    yield from lengths(task, tokenizer, layout, overlong, room)
    yield from contradictions(task)
    rows = read_task_rows(task, "train")
    for field in ("input", "target"):
      found = list(placed(rows, field))
      yield from special_strings(f"task {task.name}, {field}", found, tokenizer)
      yield from text_quality(f"task {task.name}, {field}", found)
      yield from tokens(f"task {task.name}, {field}", [text for _, text in found[:ENCODED]], tokenizer)
    known = Known(rows, "input")
    for split in (split for split in task.files if split != "train"):
      test, name = read_task_rows(task, split), f"task {task.name}, {split}"
      yield from overlap(name, known, test, "input")
      yield from overlap(f"{name}, in the corpus", corpus, test, "input", tested=False)
