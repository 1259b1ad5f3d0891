"""Prompts and answers: a row put into a task's template, and its tokens.

The same functions serve training, evaluation and the command line, so that a model is asked as it was taught.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from data.tokenizer import Tokenizer

if TYPE_CHECKING:
  from data.tasks import Task

_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


def template_fields(template: str, where: str) -> list[str]:
  """Returns the fields a template names.

  Raises:
    ValueError: anything in braces but a plain field name (`str.format` would reach attributes through it).

  Example:
    >>> template_fields("{task}: {input} {{x}}", "here")
    ['task', 'input']
  """
  if not isinstance(template, str):
    raise ValueError(f"{where}: a template must be a string, got {template!r}")
  for match in _PIECE.finditer(template):
    if match[0] in "{}":
      allowed = "only plain {field} names are allowed; write {{ for a brace"
      raise ValueError(f"{where}: template {template!r}: {allowed}")
  return [match[1] for match in _PIECE.finditer(template) if match[1]]


def fill(template: str, fields: Mapping[str, str]) -> str:
  """Puts fields into a template; braces in a field's value are left as they are.

  Example:
    >>> fill("{a} {{b}}", {"a": "{b}"})
    '{b} {b}'
  """
  return _PIECE.sub(lambda match: fields[match[1]] if match[1] else match[0][0], template)


def render(task: "Task", row: Mapping[str, str], template: int = 0) -> tuple[str, str]:
  """Returns the prompt and the answer of a row.

  Args:
    task: the task.
    row: needs the fields of the template.
    template: which of the task's templates.

  Example:
    >>> from data.tasks import Task
    >>> render(Task("urgency", "generation", "How urgent?"), {"input": "SOB", "target": "high"})
    ('urgency: How urgent?\\nSOB', 'high')
  """
  answer = task.templates[template % len(task.templates)]["target"]
  return prompt_of(task, row, template), fill(answer, _fields(task, row))


def prompt_of(task: "Task", row: Mapping[str, str], template: int) -> str:
  """Returns the prompt of a row; where the task has no instruction, a row's own `instruction` takes its place."""
  fields = {**_fields(task, row), "instruction": task.instruction or row.get("instruction", "")}
  return fill(task.templates[template % len(task.templates)]["input"], fields)


def _fields(task: "Task", row: Mapping[str, str]) -> dict[str, str]:
  return {"target": "", **row, "task": task.name, "instruction": task.instruction}


def around(task: "Task", row: Mapping[str, str], template: int) -> tuple[str, str]:
  """Returns what a template puts before and after an answer, white space aside.

  Both are empty where the target is not in it, or several times, and where it names a field that the row of a request
  lacks: then what is written is all that there is.
  """
  form, fields = task.templates[template]["target"], {**_fields(task, row), "target": "\0"}
  if not fields.keys() >= set(template_fields(form, task.name)):
    return "", ""
  framed = fill(form, fields).split("\0")
  return (framed[0].strip(), framed[1].strip()) if len(framed) == 2 else ("", "")


def unframed(task: "Task", row: Mapping[str, str], template: int, text: str) -> str:
  """Returns what a written answer says in the place of `{target}`, without what is `around` it.

  Example:
    >>> from data.tasks import Task
    >>> task = Task("note", "generation", "", templates=({"input": "{input}", "target": "Answer: {target}."},))
    >>> unframed(task, {"input": "SOB"}, 0, "Answer: short of breath."), unframed(task, {"input": "SOB"}, 0, "SOB")
    ('short of breath', 'SOB')
  """
  before, after = around(task, row, template)
  return text.strip().removeprefix(before).removesuffix(after).strip() if before or after else text


class Frame(NamedTuple):
  """What stands around a prompt and around its answer, in tokens.

  Attributes:
    before, after: a prompt's; without `after` the answer goes on where the prompt ends.
    answer_before, answer_after: an answer's; the last of all is EOS.
    telling: no answer holds the first of `answer_after`, a special token; else only all of them together end one.
  """

  before: tuple[int, ...]
  after: tuple[int, ...]
  answer_before: tuple[int, ...]
  answer_after: tuple[int, ...]
  telling: bool = True

  def prompt(self, tokens: Sequence[int], room: int) -> list[int]:
    """Returns a prompt of at most `room` tokens: one that is too long loses its end, never its frame.

    Where the answer goes on with it, it loses its beginning: what is written is to follow its end.

    Example:
      >>> Frame((), (1,), (), (1,)).prompt([4, 5, 6], 3), Frame((), (), (), (1,)).prompt([4, 5, 6], 2)
      ([4, 5, 1], [5, 6])
    """
    room = max(room - len(self.before) - len(self.after), 0)
    kept = tokens[:room] if self.after else tokens[max(len(tokens) - room, 0) :]
    return [*self.before, *kept, *self.after]

  def answer(self, tokens: Sequence[int]) -> list[int]:
    """Returns an answer as a model is trained to write it."""
    return [*self.answer_before, *tokens, *self.answer_after]

  def answered(self, tokens: Sequence[int]) -> list[int]:
    """Returns what a model has written without the frame, as far as it is there: up to what ends an answer.

    Example:
      >>> Frame((), (1,), (), (7, 1)).answered([4, 5, 7, 9, 1])
      [4, 5]
      >>> Frame((), (1,), (8, 9), (7, 1), telling=False).answered([8, 9, 4, 7, 5, 7, 1])
      [4, 7, 5]
    """
    tokens, before, after = list(tokens), list(self.answer_before), list(self.answer_after[:-1])
    tokens = tokens[: tokens.index(self.answer_after[-1])] if self.answer_after[-1] in tokens else tokens
    if before[: len(tokens)] == tokens[: len(before)]:
      tokens = tokens[len(before) :]
    if after and self.telling:
      return tokens[: tokens.index(after[0])] if after[0] in tokens else tokens
    return tokens[: -len(after)] if after and tokens[-len(after) :] == after else tokens

  def settled(self, tokens: Sequence[int]) -> int:
    """Counts the tokens that no further ones can turn into the end of an answer, or EOS has ended.

    Example:
      >>> Frame((), (1,), (), (7, 2, 1), telling=False).settled([4, 7]), Frame((), (1,), (), (7, 1)).settled([4, 7])
      (1, 2)
    """
    tokens, end = list(tokens), list(self.answer_after)
    if self.telling or end[-1] in tokens:
      return len(tokens)
    begun = (size for size in range(1, len(end)) if tokens[-size:] == end[:size])
    return len(tokens) - max(begun, default=0)


def frame_of(task: "Task | None", tokenizer: Tokenizer, continues: bool = False) -> Frame:
  """Returns a task's frame: EOS after a prompt and after an answer, or the tokenizer's chat template.

  With EOS after an answer a label that begins another label stays distinct.

  Args:
    task: the task, or None.
    tokenizer: the tokenizer.
    continues: without a task nothing stands between a prompt and its answer, as between a text and how it goes on.

  Raises:
    ValueError: the task asks for a chat template that the tokenizer lacks, or that cannot be used.
  """
  if task is None or not task.chat:
    after = () if task is None and continues else (tokenizer.eos_id,)
    return Frame((), after, (), (tokenizer.eos_id,))
  if not tokenizer.chat_template:
    raise ValueError(
      f"task {task.name!r} has `chat`: true, but the tokenizer has no chat template; take one that has "
      "(`chat_template` in its tokenizer_config.json, or chat_template.jinja), or leave `chat` out"
    )
  return _chat_frame(tokenizer)


# A template that writes the date is told the same one on any day, for a model must be asked as it was taught: the one
# that Llama 3's own template falls back on. A macro takes the place of the library's function that says it.
_TODAY = datetime.date(2024, 7, 26)
_NOW = "".join(f" | replace('%{part}', '{_TODAY.strftime(f'%{part}')}')" for part in "aAbBdHIjmMpSyY")
_NOW = f"{{%- macro strftime_now(format) -%}}{{{{ format{_NOW} }}}}{{%- endmacro +%}}"
_USER, _ASSISTANT = "\u2460user\u2461", "\u2460assistant\u2461"  # no template writes these itself


@functools.lru_cache(maxsize=8)
def _chat_frame(tokenizer: Tokenizer) -> Frame:
  """Reads a frame off the chat template, rendered once with stand-ins for the two messages.

  So a special token's name in a user's message is never made into the special token: only the template's own are.
  """
  asked = _rendered(tokenizer, [("user", _USER)], True)
  whole = _rendered(tokenizer, [("user", _USER), ("assistant", _ASSISTANT)], False)
  if not whole.startswith(asked) or asked.count(_USER) != 1 or whole.count(_ASSISTANT) != 1 or whole.count(_USER) != 1:
    raise ValueError(
      "the tokenizer's chat template cannot be used for training: a conversation must begin with its own prompt and "
      f"hold each message once; the prompt reads {asked!r}, the conversation {whole!r}"
    )
  before, after = asked.split(_USER)
  answer_before, answer_after = (tokenizer.encode_special(part) for part in whole[len(asked) :].split(_ASSISTANT))
  if tokenizer.eos_id in answer_after:
    answer_after = answer_after[: answer_after.index(tokenizer.eos_id)]
  before = tokenizer.encode_special(before)
  if before[:1] == [tokenizer.start_id]:
    before = before[1:]  # a row starts from it already
  after = tokenizer.encode_special(after)
  telling = not answer_after or tokenizer.is_special(answer_after[0])
  return Frame(tuple(before), tuple(after), tuple(answer_before), (*answer_after, tokenizer.eos_id), telling)


def _rendered(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], ask: bool) -> str:
  import jinja2
  from transformers.utils.chat_template_utils import render_jinja_template  # slow to import; it is sandboxed

  conversation = [{"role": role, "content": content} for role, content in messages]
  settings = {"add_generation_prompt": ask, **tokenizer.special_names}
  try:
    rendered, _ = render_jinja_template([conversation], chat_template=_NOW + tokenizer.chat_template, **settings)
  except jinja2.TemplateError as error:
    raise ValueError(f"the tokenizer's chat template does not render ({error}); mend it") from error
  return rendered[0]


def nested_labels(task: "Task", tokenizer: Tokenizer) -> list[tuple[str, str]]:
  """Returns the pairs of labels of which the first one's tokens begin the second one's; only EOS tells them apart."""
  if task.kind == "multi_label":
    return []  # in a set a comma or EOS follows either
  ids = dict(zip(task.labels, tokenizer.encode_batch(task.labels), strict=True))
  return [(a, b) for a in ids for b in ids if ids[a] != ids[b] and ids[b][: len(ids[a])] == ids[a]]


def same_labels(task: "Task", tokenizer: Tokenizer) -> list[list[str]]:
  """Returns the labels that are the same tokens, which no model could tell apart."""
  by_tokens: dict[tuple[int, ...], list[str]] = {}
  for label, tokens in zip(task.labels, tokenizer.encode_batch(task.labels), strict=True):
    by_tokens.setdefault(tuple(tokens), []).append(label)
  return [labels for labels in by_tokens.values() if len(labels) > 1]


def check_tasks(tasks: Mapping[str, "Task"], tokenizer: Tokenizer) -> None:
  """Raises a ValueError where two labels of a task are the same tokens, or its chat template cannot be used."""
  for name, task in tasks.items():
    if same := same_labels(task, tokenizer):
      raise ValueError(
        f"task {name!r}: the labels {same[0]} are the same tokens to this tokenizer; rename one, or take a "
        "tokenizer that knows their characters (with byte fallback, or config.tokenizer.path='train')"
      )
    frame_of(dataclasses.replace(task, name=name), tokenizer)  # an old skill is named as it is measured
