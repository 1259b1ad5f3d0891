"""The embedded domain "clinical shorthand" and general English, both made offline from a seed.

A ward note such as `72F c/o SOB x3/7, sats 86% RA. Imp: CAP. Rx amox 500mg PO TDS 5/7. R/V GP 2/52.` is drawn as facts
(`Note`) and then spelled. Two tasks are answered from the facts: `urgency` (classification: the worst positive finding
or observation decides; "no stridor" is not a finding) and `instructions` (generation: the plan in plain English).
The unlabelled corpus holds notes, and documents in which the same facts stand in shorthand and in plain words, so
that reading it teaches the dialect; it never shows a task's prompt, label or target template.

Some (drug, frequency, duration) and (finding, impression) combinations are held out: they occur only in the test split
and in every second validation row. Everything is a pure function of the seed; texts are unique over all files.
"""

import ast
import importlib
import json
import pathlib
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data import sample_tables as tables

TASKS = {  # the form of a domain folder's tasks.json, row counts are filled in by write_domain
  "urgency": {
    "kind": "classification",
    "instruction": "How soon does the patient need a doctor?",
    "labels": list(tables.LABELS),
  },
  "instructions": {"kind": "generation", "instruction": "Write the plan of the note as instructions for the patient."},
}
# Which severities the negated findings of a note have, by the note's own severity. Reassuring notes rule out danger
# signs, so that the mere presence of a word says little and "no" has to be read.
_NEGATED_WEIGHTS = ((0.1, 0.4, 0.5), (0.35, 0.15, 0.5), (0.5, 0.4, 0.1))
_WORDS = (20, 45)  # bounds on the words of a note
_TARGET_WORDS = (25, 45)
_CORPUS_CHARS = (100, 700)


class Dose(NamedTuple):
  """One prescription line: keys of `tables.DRUGS` and `tables.FREQUENCIES`, duration such as "5/7" or ""."""
  drug: str
  amount: str
  frequency: str
  duration: str
  as_needed: bool


class Advice(NamedTuple):
  """One piece of advice: a key of `tables.ADVICE`, its side (L, R or "") and time (such as 2/52, or "")."""
  code: str
  side: str
  when: str


class Visit(NamedTuple):
  """One follow-up: a key of `tables.VISITS` and its time."""
  who: str
  when: str


class Note(NamedTuple):
  """The facts of one note and its spelling.

  `findings` are (key, is present), `vitals` are (kind, number; temperatures in tenths), `plan` keeps the note's order.
  """
  age: int
  sex: str
  system: str
  complaint: str
  onset: str
  findings: tuple[tuple[str, bool], ...]
  vitals: tuple[tuple[str, int], ...]
  history: tuple[str, ...]
  impression: str
  plan: tuple[Dose | Advice | Visit, ...]
  text: str = ""


def _hash(text: str) -> int:
  """A hash that is the same in every process (Python's own is salted)."""
  return zlib.crc32(text.encode("utf-8"))


def _combinations(key: str) -> list[tuple[str, str, bool]]:
  """All (frequency, duration, is held out) of a drug; a fourth of them is held out, along the diagonals of the grid.

  Diagonals leave every frequency and every duration of the drug in training, only never in this combination.
  """
  _, _, _, _, frequencies, durations, as_needed = tables.DRUGS[key]
  durations = durations + ("",) if as_needed else durations
  return [(f, d, (i + j + _hash(key)) % 4 == 0) for i, f in enumerate(frequencies) for j, d in enumerate(durations)]


def is_held_out_dose(dose: Dose) -> bool:
  """Whether a (drug, frequency, duration) belongs to the test split only."""
  return (dose.frequency, dose.duration, True) in _combinations(dose.drug)


def is_held_out_finding(system: str, finding: str, impression: str) -> bool:
  """Whether a (finding, impression) belongs to the test split only: each finding lacks one of its system's three."""
  impressions = list(tables.SYSTEMS[system]["impressions"])
  position = next(list(group).index(finding) for group in tables.SYSTEMS[system]["findings"] if finding in group)
  return impressions[(position + _hash(system)) % len(impressions)] == impression


def vital_severity(kind: str, number: int) -> int:
  """Severity 0, 1 or 2 of an observation, from the bands of `tables.VITALS`."""
  for severity, ranges in enumerate(tables.VITALS[kind][2]):
    if any(low <= number <= high for low, high in ranges):
      return severity
  raise ValueError(f"expected a {kind} inside one of the bands {tables.VITALS[kind][2]}, got {number}")


def finding_severity(system: str, finding: str) -> int:
  """Severity 0, 1 or 2 of a finding that is present."""
  return next(s for s, group in enumerate(tables.SYSTEMS[system]["findings"]) if finding in group)


def urgency(note: Note) -> str:
  """The note's label: its worst observation or present finding decides."""
  worst = [vital_severity(kind, number) for kind, number in note.vitals]
  worst += [finding_severity(note.system, key) for key, present in note.findings if present]
  return tables.LABELS[2 - max(worst)]


# ---- drawing the facts ----


def _draw_findings(rng: random.Random, system: str, impression: str, severities: list[int], negated: list[int],
                   held_out: bool) -> tuple[tuple[str, bool], ...]:
  """Distinct findings of the given severities: present ones first, then negated ones.

  With `held_out` the present findings must be held out with the impression; without, nothing mentioned may be.
  """
  chosen: dict[str, bool] = {}
  for number, severity in enumerate(severities + negated):
    present = number < len(severities)
    group = tables.SYSTEMS[system]["findings"][severity]
    options = [key for key in group if key not in chosen
               and (not present if held_out else True)
               and not (not held_out and is_held_out_finding(system, key, impression))]
    if present and held_out:
      options = [key for key in group if key not in chosen and is_held_out_finding(system, key, impression)]
    if options:
      chosen[rng.choice(options)] = present
  return tuple(chosen.items())


def _draw_vitals(rng: random.Random, severities: list[int]) -> tuple[tuple[str, int], ...]:
  """One observation of a kind of its own for each severity."""
  kinds = rng.sample(sorted(tables.VITALS), len(severities))
  return tuple((kind, rng.randint(*rng.choice(tables.VITALS[kind][2][severity])))
               for kind, severity in zip(kinds, severities, strict=True))


def _draw_clinical(rng: random.Random, severity: int, system: str, impression: str, held_out: bool):
  """Findings and vitals whose worst severity is the given one, carried by a finding, an observation, or both."""
  def below(top: int) -> int:
    return rng.choice((0, 0, *range(top + 1)))

  carrier = rng.choices(("finding", "vital", "both"), (0.55, 0.35, 0.1))[0]
  lower = max(severity - 1, 0)
  present = [severity if carrier != "vital" else rng.randint(0, lower)]
  if rng.random() < 0.25:
    present.append(below(present[0]))
  vitals = [severity if carrier != "finding" else below(lower)]
  vitals += [below(lower) for _ in range(rng.choice((0, 1, 1)))]
  rng.shuffle(vitals)
  negated = rng.choices(tables.SEVERITIES, _NEGATED_WEIGHTS[severity], k=rng.choice((1, 1, 2)))
  findings = _draw_findings(rng, system, impression, present, negated, held_out)
  return findings, _draw_vitals(rng, vitals)


def _draw_dose(rng: random.Random, key: str, held_out: bool) -> Dose:
  """One prescription line whose combination is (or is not) held out."""
  drug = tables.DRUGS[key]
  frequency, duration, _ = rng.choice([c for c in _combinations(key) if c[2] == held_out])
  return Dose(key, rng.choice(drug[3]), frequency, duration, not duration or (drug[6] and rng.random() < 0.5))


def _draw_plan(rng: random.Random, system: str, held_out: bool) -> tuple[Dose | Advice | Visit, ...]:
  """Drugs, advice and follow-up in a random order; drugs stay together."""
  doses, advice, visits = rng.choice(((2, 1, 1), (2, 1, 1), (2, 0, 1), (1, 2, 1), (2, 2, 0), (1, 2, 2)))
  keys = rng.sample([key for key, drug in tables.DRUGS.items() if drug[1] in (system, "*")], doses)
  groups = [[_draw_dose(rng, key, held_out) for key in keys]]
  for code in rng.sample(list(tables.ADVICE), advice):
    groups.append([Advice(code, rng.choice("LR") if "{side}" in code else "",
                          rng.choice(tables.VISIT_TIMES) if "{when}" in code else "")])
  groups += [[Visit(who, rng.choice(tables.VISIT_TIMES))] for who in rng.sample(list(tables.VISITS), visits)]
  rng.shuffle(groups)
  return tuple(item for group in groups for item in group)


def draw_note(rng: random.Random, held_out: bool = False) -> Note:
  """Draws one note.

  Args:
    rng: source of all randomness.
    held_out: True makes every (drug, frequency, duration) and every (present finding, impression) a held-out one,
      False makes none of those mentioned in the note one.

  Returns:
    A note of 20..45 words whose instructions have 25..45 words.
  """
  while True:
    system = rng.choice(sorted(tables.SYSTEMS))
    impression = rng.choice(list(tables.SYSTEMS[system]["impressions"]))
    findings, vitals = _draw_clinical(rng, rng.choice(tables.SEVERITIES), system, impression, held_out)
    note = Note(
      age=rng.randint(18, 95), sex=rng.choice("FM"), system=system,
      complaint=rng.choice(list(tables.SYSTEMS[system]["complaints"])), onset=rng.choice(tables.ONSETS),
      findings=findings, vitals=vitals, history=tuple(rng.sample(list(tables.HISTORY), rng.choice((0, 1, 1, 2)))),
      impression=impression, plan=_draw_plan(rng, system, held_out))
    note = note._replace(text=_spell_note(rng, note))
    if (_WORDS[0] <= len(note.text.split()) <= _WORDS[1] and len(note.text) >= _CORPUS_CHARS[0]
        and _TARGET_WORDS[0] <= len(instructions(note).split()) <= _TARGET_WORDS[1]):
      return note


# ---- spelling: shorthand ----


def _spell(rng: random.Random, table: dict, key: str) -> str:
  """A random spelling of a table's entry, the key being its first or all of its spellings."""
  spellings = key.split("|")
  if key not in table:
    raise KeyError(f"expected an entry of the table, got {key!r}; known: {sorted(table)}")
  return spellings[0] if rng.random() < 0.5 else rng.choice(spellings)


def _number(kind: str, number: int, rng: random.Random | None = None) -> str:
  """The digits of an observation; a blood pressure gets its lower number."""
  if kind == "T":
    return f"{number // 10}.{number % 10}"
  if kind == "BP":
    return f"{number}/{number * 5 // 8 // 2 * 2}"
  return str(number)


def _spell_dose(rng: random.Random, dose: Dose) -> str:
  """Such as `amox 500mg PO TDS 5/7`."""
  frequency = next(key for key in tables.FREQUENCIES if key.split("|")[0] == dose.frequency)
  parts = [_spell(rng, tables.DRUGS, dose.drug), dose.amount, tables.DRUGS[dose.drug][2],
           _spell(rng, tables.FREQUENCIES, frequency)]
  if dose.as_needed:
    parts.append(rng.choice(tables.AS_NEEDED[0].split("|")))
  if dose.duration:
    parts.append(rng.choice(("", "", "x")) + dose.duration)
  return " ".join(parts)


def _spell_plan(rng: random.Random, plan: tuple) -> list[str]:
  """One sentence for the drugs together, one for each other item, in the plan's order."""
  sentences, doses = [], [_spell_dose(rng, item) for item in plan if isinstance(item, Dose)]
  for item in plan:
    if isinstance(item, Dose):
      if doses:
        sentences.append(rng.choice(("Rx ", "Rx: ", "Start ", "TTO ")) + ", ".join(doses))
        doses = []
    elif isinstance(item, Advice):
      code = _spell(rng, tables.ADVICE, item.code).format(side=item.side, when=item.when)
      sentences.append(code[0].upper() + code[1:])
    else:
      sentences.append(f"{rng.choice(tables.VISITS[item.who][0]).capitalize()} {item.who} {item.when}"
                       if item.who in ("FBC", "U&E", "CXR")
                       else f"{rng.choice(tables.VISITS[item.who][0])} {item.who} {item.when}")
  return sentences


def _spell_note(rng: random.Random, note: Note) -> str:
  """The note as a ward would write it: one of several orders of its parts, each in one of its spellings."""
  system = tables.SYSTEMS[note.system]
  every_finding = {key: plain for group in system["findings"] for key, plain in group.items()}
  complaint = _spell(rng, system["complaints"], note.complaint)
  person = rng.choice((f"{note.age}{note.sex}", f"{note.age}{note.sex}", f"{note.age}yo {note.sex}"))
  header = person + " " + rng.choice((f"c/o {complaint} x{note.onset}", f"p/w {complaint} {note.onset}",
                                      f"{note.onset} hx {complaint}"))
  findings = [("" if present else rng.choice(tables.NEGATIONS) + " ") + _spell(rng, every_finding, key)
              for key, present in note.findings]
  rng.shuffle(findings)
  signs = rng.choice(("O/E ", "", "")) + ", ".join(findings)
  vitals = rng.choice(("Obs: ", "", "")) + ", ".join(
    rng.choice(tables.VITALS[kind][0]).format(_number(kind, number)) for kind, number in note.vitals)
  history = rng.choice(("PMH ", "bg ", "PMH: ")) + ", ".join(note.history) if note.history else ""
  impression = rng.choice(("Imp: ", "Imp ", "Dx ", "?")) + _spell(rng, system["impressions"], note.impression)
  order = rng.choice(((header, signs, vitals, history, impression), (header, history, vitals, signs, impression),
                      (header, vitals, signs, history, impression), (header, impression, signs, vitals, history),
                      (header, history, impression, vitals, signs)))
  return ". ".join([part for part in order if part] + _spell_plan(rng, note.plan)) + "."


# ---- spelling: plain English ----


def duration_words(duration: str) -> str:
  """`3/7` -> "3 days", `1/52` -> "1 week", `2/12` -> "2 months"."""
  count, unit = duration.split("/")
  return f"{count} {tables.TIME_UNITS[unit]}{'' if count == '1' else 's'}"


def amount_words(amount: str) -> str:
  """`500mg` -> "500 mg", `300mcg` -> "300 micrograms", `1%` -> "1%"."""
  count, unit = re.fullmatch(r"([\d.]+) ?(\D+)", amount).groups()
  return f"{count}{'' if unit == '%' else ' '}{tables.DOSE_UNITS[unit]}"


def frequency_words(frequency: str) -> str:
  """`TDS` -> "three times a day"."""
  return next(words for key, words in tables.FREQUENCIES.items() if key.split("|")[0] == frequency)


def _dose_facts(dose: Dose) -> tuple[str, str, str, str, str, str, str]:
  """Plain (verb, drug, amount, route, frequency, " when you need it" or "", " for 5 days" or "")."""
  verb, route = tables.ROUTES[tables.DRUGS[dose.drug][2]]
  return (verb, tables.DRUGS[dose.drug][0], amount_words(dose.amount), route, frequency_words(dose.frequency),
          f" {tables.AS_NEEDED[1]}" if dose.as_needed else "",
          f" for {duration_words(dose.duration)}" if dose.duration else "")


def _advice_words(item: Advice) -> str:
  """The advice as a sentence without its full stop."""
  return tables.ADVICE[item.code].format(side=tables.SIDES.get(item.side, ""),
                                         when=duration_words(item.when) if item.when else "")


def instructions(note: Note) -> str:
  """The plan of a note in canonical plain English, in the note's order: the target of the generation task."""
  sentences = []
  for item in note.plan:
    if isinstance(item, Dose):
      verb, drug, amount, route, frequency, needed, duration = _dose_facts(item)
      sentences.append(f"{verb} {drug} {amount} {route} {frequency}{needed}{duration}.")
    elif isinstance(item, Advice):
      sentences.append(_advice_words(item) + ".")
    else:
      sentences.append(f"{tables.VISITS[item.who][1]} in {duration_words(item.when)}.")
  return " ".join(sentences)


def _plain_findings(note: Note) -> dict[str, str]:
  return {key: plain for group in tables.SYSTEMS[note.system]["findings"] for key, plain in group.items()}


def _vital_words(kind: str, number: int) -> str:
  return tables.VITALS[kind][1].format(_number(kind, number))


def _letter(rng: random.Random, note: Note) -> str:
  """The note and the letter that the patient takes home: the facts of the task's targets in other wording."""
  system = tables.SYSTEMS[note.system]
  parts = [rng.choice(("Dear patient,", "Letter to the patient:"))]
  parts.append(f"you told us about {system['complaints'][note.complaint]} for {duration_words(note.onset)}.")
  impression = next(words for key, words in system["impressions"].items() if key == note.impression)
  parts.append(rng.choice((f"We think it is {impression}.", f"The doctors believe this is {impression}.")))
  doses = []
  for item in note.plan:
    if isinstance(item, Dose):
      _, drug, amount, route, frequency, needed, duration = _dose_facts(item)
      doses.append(f"{drug} {amount} {route}, {frequency}{needed}{',' if duration else ''}{duration}")
  parts.append(rng.choice(("Your tablets and medicines:", "We gave you")) + " " + "; ".join(doses) + ".")
  for item in note.plan:
    if isinstance(item, Advice):
      words = _advice_words(item)
      parts.append("Please " + words[0].lower() + words[1:] + ".")
    elif isinstance(item, Visit):
      parts.append(f"{tables.VISITS[item.who][2]} in {duration_words(item.when)}.")
  return rng.choice(("", "Note: ")) + note.text + "\n" + " ".join(parts)


def _clinical_words(rng: random.Random, note: Note) -> list[str]:
  """Findings and observations in plain words, in the note's stored order."""
  plain = _plain_findings(note)
  words = [("" if present else "no sign of ") + plain[key] for key, present in note.findings]
  return words + [_vital_words(kind, number) for kind, number in note.vitals]


def _triage_words(rng: random.Random, note: Note) -> str:
  """The triage nurse's remark: the items that decide, and what follows from them."""
  plain = _plain_findings(note)
  items = [(finding_severity(note.system, key), plain[key]) for key, present in note.findings if present]
  items += [(vital_severity(kind, number), _vital_words(kind, number)) for kind, number in note.vitals]
  worst = max(severity for severity, _ in items)
  reason = " and ".join(words for severity, words in items if severity == worst)
  return f"Triage: {reason}; {rng.choice(tables.REMARKS[worst])}."


def _handover(rng: random.Random, note: Note) -> str:
  """A note with a triage remark, or a nurse's handover of it in fuller words (and sometimes the remark)."""
  if rng.random() < 0.6:
    return note.text + "\n" + _triage_words(rng, note)
  system, person = tables.SYSTEMS[note.system], "woman" if note.sex == "F" else "man"
  text = (f"Handover: {note.age} year old {person}, {system['complaints'][note.complaint]} for "
          f"{duration_words(note.onset)}; {', '.join(_clinical_words(rng, note))}. ")
  if note.history:
    text += "Known: " + ", ".join(tables.HISTORY[key] for key in note.history) + ". "
  text += f"Treated for {system['impressions'][note.impression]}."
  if rng.random() < 0.5:
    text += " " + _triage_words(rng, note)
  return note.text + "\n" + text


# ---- documents, files ----


def _glossary() -> dict[str, str]:
  """Every shorthand with its plain words, each spelling an entry, for the ward handbook."""
  sources: list[dict[str, str]] = [
    tables.FREQUENCIES, {tables.AS_NEEDED[0]: tables.AS_NEEDED[1]}, tables.HISTORY,
    {key: words for key, (_, words) in tables.ROUTES.items()}, {key: drug[0] for key, drug in tables.DRUGS.items()},
    {key: words for key, (_, words, _) in tables.VISITS.items()},
    {key.format(side=side, when="2/52"): words.format(side=tables.SIDES[side], when="2 weeks")
     for key, words in tables.ADVICE.items() for side in "LR"},
    {duration: duration_words(duration) for duration in (*tables.ONSETS, *tables.VISIT_TIMES, "10/7", "2/12", "6/12")},
  ]
  for system in tables.SYSTEMS.values():
    sources += [system["complaints"], system["impressions"]]
    sources += [{key: f"{words}. {remarks[-1].capitalize()}" for key, words in group.items()}
                for group, remarks in zip(system["findings"], tables.REMARKS, strict=True)]
  return {spelling: words for source in sources for key, words in source.items() for spelling in key.split("|")
          if spelling.lower() != words.lower()}


def _handbook(rng: random.Random, glossary: dict[str, str]) -> str:
  """Some handbook entries, each an abbreviation with its meaning, or a range of an observation."""
  lines = [f"{key}: {glossary[key]}." for key in rng.sample(sorted(glossary), rng.randint(4, 7))]
  kind = rng.choice(sorted(tables.VITALS))
  severity = rng.choice(tables.SEVERITIES)
  low, high = rng.choice(tables.VITALS[kind][2][severity])
  lines.append(f"{tables.VITALS[kind][1].format(_number(kind, low))} to {_number(kind, high)}: "
               f"{rng.choice(tables.REMARKS[severity])}.")
  rng.shuffle(lines)
  return "Ward handbook.\n" + "\n".join(lines)


def _documents(rng: random.Random, count: int, fresh: Callable[[random.Random, bool], Note]) -> Iterator[str]:
  """The unlabelled corpus: 55 % notes, 25 % notes with letters, 12 % handovers and triage, 8 % handbook pages."""
  glossary = _glossary()
  for _ in range(count):
    kind = rng.choices(("note", "letter", "handover", "handbook"), (0.55, 0.25, 0.12, 0.08))[0]
    while True:
      if kind == "handbook":
        text = _handbook(rng, glossary)
      else:
        note = fresh(rng, False)
        text = {"note": lambda r, n: n.text, "letter": _letter, "handover": _handover}[kind](rng, note)
      if _CORPUS_CHARS[0] <= len(text) <= _CORPUS_CHARS[1]:
        break
    yield text


def domain_notes(seed: int = 0, train: int = 3000, validation: int = 150, test: int = 250, taken: set[str] | None = None,
                 ) -> dict[str, dict[str, list[Note]]]:
  """The notes behind the tasks' rows, by task and split; no text occurs twice.

  Args:
    seed: of everything.
    train: rows of each training split; likewise `validation` and `test`.
    taken: texts that are used already; the new ones are added to it.
  """
  taken = set() if taken is None else taken
  sizes = {"test": test, "validation": validation, "train": train}  # the small splits come first, so that the size
  result: dict[str, dict[str, list[Note]]] = {task: {} for task in TASKS}  # of training does not change them
  for split, size in sizes.items():
    for task in TASKS:
      rng = random.Random(f"{seed} {task} {split}")
      result[task][split] = [_fresh(rng, split == "test" or (split == "validation" and row % 2 == 1), taken)
                             for row in range(size)]
  return result


def _fresh(rng: random.Random, held_out: bool, taken: set[str]) -> Note:
  """A note whose text was not drawn before."""
  while (note := draw_note(rng, held_out)).text in taken:
    pass
  taken.add(note.text)
  return note


def _write_lines(path: pathlib.Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8", newline="\n") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_domain(folder: str | pathlib.Path, seed: int = 0, notes: int = 6000, train: int = 3000,
                 validation: int = 150, test: int = 250) -> None:
  """Writes the sample domain in domain-folder form; the same arguments give the same bytes.

  Args:
    folder: where to write: corpus.jsonl, corpus_validation.jsonl, tasks.json, and for each of the tasks `urgency` and
      `instructions` train.jsonl, validation.jsonl and test.jsonl with `input` and `target`.
    seed: another seed, other notes.
    notes: documents of the corpus; the validation corpus has a twentieth of them (at least one).
    train: rows of each task's training split; likewise `validation` and `test`.
  """
  folder, taken = pathlib.Path(folder), set()
  answers = {"urgency": urgency, "instructions": instructions}
  by_task = domain_notes(seed, train, validation, test, taken)
  for task, splits in by_task.items():
    for split, items in splits.items():
      _write_lines(folder / task / f"{split}.jsonl", [{"input": n.text, "target": answers[task](n)} for n in items])
  for name, count in (("corpus_validation", max(1, notes // 20)), ("corpus", notes)):
    texts = _documents(random.Random(f"{seed} {name}"), count, lambda rng, held_out: _fresh(rng, held_out, taken))
    _write_lines(folder / f"{name}.jsonl", [{"text": text} for text in texts])
  rows = {"train": train, "validation": validation, "test": test}
  (folder / "tasks.json").write_text(
    json.dumps({task: {**entry, "rows": rows} for task, entry in TASKS.items()}, indent=1) + "\n", encoding="utf-8")
