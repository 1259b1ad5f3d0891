"""The recipe: base, continued pre-training, multitask fine-tuning, arms to compare; each evaluated; a report.

workdir/domain/          the embedded domain, where config.domain is "sample"
workdir/tokenizer/       the trained tokenizer, where config.tokenizer.path is "train"
workdir/stages/NAME/     see train/stage.py; and of the stage's evaluation:
  calibration.json       task -> temperature, threshold, see train/calibration.py
  scores.npz             skill -> parts of the headline, example by example, see train/evaluate.py
  evaluation.json        metrics and samples; written last: it marks a stage that is done and is not run again
workdir/report.{json,html}
"""

import functools
import itertools
import os
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data import sample
from data.cache import cache_folder, programs_folder
from data.components import form_of_pieces, held_out_objective
from data.files import read_json, whole
from data.inspect import copied, cut_answers, sizes
from data.pipeline import Stream, build_stream, held_out_batches
from data.prompts import check_tasks
from data.sources import Texts, open_texts, texts_of
from data.tasks import RESERVED, Domain, Task, hold_out, load_domain, read_task_rows
from data.tokenizer import Tokenizer, is_saved, load_tokenizer, train_tokenizer
from models.sharding import whole_batch
from train import evaluate, gate, loop, processes, replay, statistics
from train.arms import Stage, overruled, plan_stages, stage_config
from train.averaging import average_stages
from train.baselines import baselines
from train.collect import build_report, outline
from train.evaluator import Evaluator
from train.metrics import VALUES, headline
from train.report import write_report
from train.reuse import check_made_of, check_measured, check_same_rows, stored_record
from train.skills import Skills, build_skills, describe_skills
from train.stage import Materials, check_description, check_same_everywhere, inherit, write_json
from train.validation import check_validation

_SKILL = "skill "  # before its name in scores.npz: a skill may be named as one of numpy's arguments is
NO_GENERAL = 'config.general is "": mixtures go without general text'


def run_recipe(config: ConfigDict, workdir: str | Path, given: Collection[str] = ()) -> dict[str, Any]:
  """Runs every stage that is not done yet, evaluates it, and writes the report.

  Args:
    config: with `stages`, `arms`, `gate` and `retain`.
    workdir: the recipe's folder.
    given: keys of it that the command line set, see `overruled`.

  Returns:
    The report; where there are rules, its "gate" says whether they are met.

  Raises:
    ValueError: a stage, arm or rule that cannot be; a given key that reaches no stage; another config than the one
      the workdir was made with.
  """
  workdir = Path(workdir)
  prepare_jax(config)
  processes.check_shared(workdir)
  for line in overruled(config, given):
    print(line, flush=True)
  workdir.mkdir(parents=True, exist_ok=True)
  config = inherit(config)
  materials = load_materials(config, workdir)
  stages, skills = plan_stages(config, materials.domain), processes.together(lambda: build_skills(config, materials))
  rules = read_gate(config, stages, skills)
  inputs = check_before(config, workdir, stages, skills, materials)
  results = {}

  @functools.cache  # for the first report, and not before
  def known() -> dict[str, Any]:
    return {name: baselines(task, limit=config.evaluate.max_examples) for name, task in materials.domain.tasks.items()}

  for stage in stages:
    was_done = processes.agree((workdir / "stages" / stage.name / "evaluation.json").exists())
    results[stage.name] = run_stage(config, workdir, stage, materials, skills, inputs.get(stage.name))
    if was_done and stage is not stages[-1]:
      continue  # nothing new to report yet

    def report() -> None:
      scores = {name: read_scores(workdir / "stages" / name) for name in results}
      write_report(build_report(config, stages, materials, skills, results, known(), workdir), workdir, scores, rules)

    processes.first(report)
  written = read_json(workdir / "report.json")
  print("\n".join([*gate.lines(written["gate"]), ""] if rules else []), end="", flush=True)
  print(f"report: {workdir / 'report.html'}", flush=True)
  return written


def check_before(
  config: ConfigDict, workdir: Path, stages: Sequence[Stage], skills: Skills, materials: Materials
) -> dict[str, Mapping[str, Any]]:
  """Reads every text, and checks every row and setting, before the first long run.

  Returns:
    What tells each trained stage's input from others, see `Stream.fingerprint`.

  Raises:
    ValueError: what would end a later stage, or its evaluation; other files than those of another process.
  """
  check_same_everywhere(skills.fingerprint(), config)
  evaluate.check_evaluation(config.evaluate, skills.tasks)
  check_tasks(skills.tasks, materials.tokenizer)
  form_of_pieces(held_out_objective(config), config, materials.tokenizer)
  for line in processes.together(lambda: answers_cut(skills.tasks, materials.tokenizer, config.evaluate)):
    print(f"warning: {line}; raise that setting", flush=True)
  for name, task in materials.domain.tasks.items():
    if said := processes.together(lambda task=task: copied(task)):
      print(f"warning: {name}: {said}; new text will do worse than the report says: split without copies", flush=True)
  for texts in skills.texts.values():
    processes.together(lambda texts=texts: held_out_batches(texts, materials.tokenizer, config))
  inputs = {}
  for stage in stages:
    if not stage.average_with:
      own, stream = processes.together(lambda stage=stage: open_stage(config, workdir, stage, materials))
      loop.check_config(own, materials.tokenizer)
      inputs[stage.name] = stream.fingerprint()
  return inputs


def answers_cut(tasks: Mapping[str, Task], tokenizer: Tokenizer, settings: ConfigDict) -> list[str]:
  """Says of which tasks' test rows a model could not write the right answer whole, with `config.evaluate`."""
  found = {}
  for name, task in tasks.items():
    if task.kind == "generation":
      rows = read_task_rows(task, "test").spread(settings.max_examples)
      found[name] = cut_answers(sizes(task, 0, rows, tokenizer)[1], settings.max_new_tokens)
  return [f"{name}: {said}" for name, said in found.items() if said]


def read_gate(config: ConfigDict, stages: Sequence[Stage], skills: Skills) -> dict[str, list[gate.Rule]]:
  """Reads `config.gate` for a recipe's stages and skills; raises as `gate.read_rules`."""
  return gate.read_rules(config.gate.to_dict(), [outline(stage) for stage in stages], describe_skills(skills))


def open_stage(config: ConfigDict, workdir: Path, stage: Stage, materials: Materials) -> tuple[ConfigDict, Stream]:
  """Reads every text and checks every row that a stage will train on and be measured on as it goes.

  Returns:
    The stage's config and its stream; what is sampled for replay is not there yet, other text stands in.

  Raises:
    ValueError: what `stage_config`, `check_validation` and `build_stream` refuse.
  """
  own = stage_config(config, stage, workdir)
  return own, open_stream(own, materials)


def open_stream(config: ConfigDict, materials: Materials) -> Stream:
  """Does what `open_stage` does, for a stage whose config is there."""
  check_validation(config, materials.domain.tasks)
  sources = {**materials.sources, replay.NAME: replay.stand_in()}
  return build_stream(config, materials.tokenizer, materials.domain, materials.general, sources)


def prepare_jax(config: ConfigDict) -> None:
  """Sets JAX up for a run, before its first use, and joins the run's other processes; environment settings win.

  Compiled programs are kept on disk, so that stages and later runs reuse them; a CPU is split into
  `config.cpu_devices` (two devices keep two cores busier than one device does).
  """
  environment = os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if config.cpu_devices and not environment:
    try:
      jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    except RuntimeError:  # a notebook has used JAX already
      print(f"JAX has started; config.cpu_devices={config.cpu_devices} comes too late", flush=True)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(programs_folder(config.data.cache_dir).resolve()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  processes.start(config.processes)


def load_materials(config: ConfigDict, workdir: Path) -> Materials:
  """Reads the domain, the general text and the tokenizer that a config names; makes those that it asks to be made.

  Args:
    config: the config.
    workdir: where made things are kept.

  Raises:
    FileNotFoundError: a part of them is missing.
    ValueError: a part is malformed, a source has a name that means something else, or tasks and tokenizer do not go
      together.
  """
  cache, bad_rows = cache_folder(config.data.cache_dir), config.data.bad_rows
  folder, tasks = domain_folder(config, workdir), config.tasks.to_dict()
  domain = processes.together(lambda: load_domain(folder, tasks, config.data.cache_dir, bad_rows))
  evaluate.check_evaluation(config.evaluate, domain.tasks)
  named = config.sources.to_dict().items()
  sources = processes.together(lambda: {name: open_texts(source, cache, bad_rows) for name, source in named})
  general, general_test = processes.together(lambda: open_general(config.general, cache, bad_rows, sources))
  if general is None:
    print(NO_GENERAL, flush=True)
  if taken := set(sources) & {*RESERVED, *domain.tasks}:
    raise ValueError(f"config.sources has {sorted(taken)}: these names mean something else in a mixture; rename them")
  tokenizer = find_tokenizer(config, workdir, domain, general)
  check_tasks(domain.tasks, tokenizer)
  return Materials(tokenizer, domain, general, general_test, sources)


def domain_folder(config: ConfigDict, workdir: Path) -> Path:
  """Returns the domain's folder; writes the embedded one where the config asks for it."""
  if config.domain != "sample":
    return Path(config.domain)
  folder = workdir / "domain" / "sample"
  if not processes.agree((folder / "tasks.json").exists() and has_stages(workdir)):  # written last
    processes.first(lambda: sample.write_domain(folder, seed=config.seed))
  return folder


def find_tokenizer(config: ConfigDict, workdir: Path, domain: Domain, general: Texts | None) -> Tokenizer:
  """Loads the tokenizer that the config names; trains one where it asks for that.

  One that is there, and was made of other texts or settings, is trained anew as long as no stage has used it.
  """
  path = config.tokenizer.path
  if path == "train":
    path = str(workdir / "tokenizer")
    settings = {key: config.tokenizer[key] for key in ("vocab_size", "sentinels")}
    made_of = {**settings, "texts": [texts.digest() for texts in (domain.corpus, general) if texts]}
    about = Path(path) / "trained.json"
    same = about.exists() and read_json(about) == made_of
    if not processes.agree(is_saved(path) and (same or has_stages(workdir))):
      texts = itertools.chain(domain.corpus, general or [])
      learned = "the domain and general text" if general else "the domain's text"
      print(f"training a tokenizer of {config.tokenizer.vocab_size} tokens on {learned}", flush=True)

      def make() -> None:
        train_tokenizer(texts, **settings).save(path)
        write_json(about, made_of)

      processes.first(make)
  return load_tokenizer(path)


def has_stages(workdir: Path) -> bool:
  """Says whether anything in a workdir has been trained, or begun to be."""
  return (workdir / "config.json").exists() or any(workdir.glob("stages/*/config.json"))


def open_general(
  source: str, cache: Path, bad_rows: str, sources: dict[str, Texts]
) -> tuple[Texts | None, Texts | None]:
  """Returns training and held-out documents of the general text.

  Args:
    source: "python", a source, "" for none, or the name of one of `config.sources`, where a split or a field can be
      chosen.
    cache: folder for unpacked files.
    bad_rows: `config.data.bad_rows`.
    sources: those of the config; the one that is the general text leaves them, for a part of it is held out.
  """
  if not source:
    return None, None
  if source in sources:
    return hold_out(sources.pop(source), f"config.general, the source {source!r},")
  if source == "python":
    train, held = sample.general_texts()
    return texts_of(train, "python"), texts_of(held, "python")
  texts = open_texts(source, cache, bad_rows)
  return hold_out(texts, f"config.general, {source},")


def run_stage(
  config: ConfigDict,
  workdir: Path,
  stage: Stage,
  materials: Materials,
  skills: Skills,
  input_now: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Trains (or averages) and evaluates a stage, or reads the evaluation of one that is done.

  Args:
    config: the recipe's.
    workdir: of the recipe.
    stage: as it is planned.
    materials: what it is made from.
    skills: what is measured.
    input_now: the fingerprint of what it trains on; None of an average.

  Returns:
    `run` (steps, tokens, seconds, counts), `parameters`, `skills` (metrics by skill), `rows` and `asked` (see
    `Skills`) and `samples` by task.
  """
  folder = workdir / "stages" / stage.name
  own = stage_config(config, stage, workdir)
  done = folder / "evaluation.json"
  check_description(folder, own, materials)
  if record := stored_record(folder):
    check_made_of(record, own, stage, input_now, folder)
  if processes.agree(done.exists()):
    result = read_json(done)
    check_measured(result["skills"], skills.tasks, own, done)
    check_same_rows(result, stage, skills, done)
    print(f"{stage.name}: done", flush=True)
    return result
  run = (
    average_stages(own, folder, stage, materials)
    if stage.average_with
    else loop.train(own, folder, materials, stage.name)
  )
  with jax.set_mesh(run.mesh):
    evaluator = Evaluator(own, run.model, run.params, materials.tokenizer)
    measured = evaluate_all(evaluator, skills.tasks, skills.texts, "test", measure_of(config, own))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
  result = {"run": run.record, "parameters": parameters, "rows": dict(skills.digests)}
  result["asked"] = dict(skills.asked)
  result["skills"] = {name: found.metrics for name, found in measured.items()}
  own_tasks = materials.domain.tasks
  result["samples"] = {name: found.samples for name, found in measured.items() if name in own_tasks}
  fitted = {name: f.calibration._asdict() for name, f in measured.items() if f.calibration and name in own_tasks}

  def write() -> None:
    write_json(folder / "calibration.json", fitted)
    write_scores(folder, {name: found.parts for name, found in measured.items()})
    write_json(done, result)  # last: a stage that has it is done

  processes.first(write)
  return result


def measure_of(config: ConfigDict, own: ConfigDict) -> ConfigDict:
  """Returns a stage's config with the recipe's form of texts, so that all stages are asked for the same tokens."""
  result = own.copy_and_resolve_references()
  with result.unlocked():
    for key in ("noise_density", "mean_span_length", "encoder_length", "decoder_length"):
      result.data[key] = config.data[key]
  return result.lock()


def evaluate_all(
  evaluator: Evaluator,
  tasks: Mapping[str, Task],
  held_out: Mapping[str, Texts],
  split: str,
  measure: ConfigDict | None = None,
) -> dict[str, evaluate.Measured]:
  """Measures every skill.

  Args:
    evaluator: the model.
    tasks: by name.
    held_out: documents for perplexity, by skill.
    split: of the tasks.
    measure: `evaluate.objective` and `data` are the form of held-out texts; None: as the model learned.

  Returns:
    What was found by skill; its metrics have `interval` beside `value`: the 95 % interval, None where there is none.

  Raises:
    ValueError: what `check_evaluation` and `check_tasks` refuse.
  """
  evaluate.check_evaluation(evaluator.config.evaluate, tasks)
  check_tasks(tasks, evaluator.tokenizer)
  measured, metrics = {}, dict.fromkeys(held_out, "perplexity")
  for name, texts in held_out.items():
    rows = whole_batch(evaluator.config.evaluate.batch_size)
    found = held_out_batches(texts, evaluator.tokenizer, measure or evaluator.config, rows)
    measured[name] = evaluate.perplexity(evaluator, iter(found.batches), found.count_bytes)
    measured[name].metrics.update({"skipped": found.skipped} if found.skipped else {})
  for name, task in tasks.items():
    measured[name] = evaluate.evaluate_task(evaluator, task, split)
    metrics[name] = headline(task.kind, task.metrics)
  for name, found in measured.items():
    found.metrics["interval"] = statistics.interval(found.parts, VALUES[metrics[name]])
    if skipped := found.metrics.get("skipped"):
      print(f"evaluation: {name}: {sum(skipped.values()):,} rows were skipped: {skipped}", flush=True)
    if found.calibration and found.calibration.note:
      print(f"evaluation: {name}: {found.calibration.note}", flush=True)
  shown = "  ".join(f"{name} {found.metrics['value']:.3f}" for name, found in measured.items())
  print(f"evaluation: {shown}", flush=True)
  if evaluator.cut:
    print(f"evaluation: {len(evaluator.cut)} prompts were cut to fit rows of {evaluator.row} tokens", flush=True)
  return measured


def write_scores(folder: Path, parts: Mapping[str, np.ndarray]) -> None:
  """Writes the parts of each skill's headline; a reader never sees half of it."""
  with whole(folder / "scores.npz") as file:
    np.savez_compressed(file, **{f"{_SKILL}{name}": found for name, found in parts.items()})


def read_scores(folder: Path) -> dict[str, np.ndarray]:
  """Reads what `write_scores` wrote.

  Raises:
    FileNotFoundError: the stage was evaluated by a version of Argot that did not write it.
    ValueError: it is damaged.
  """
  path = folder / "scores.npz"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing: an older version evaluated that stage; delete evaluation.json beside it and run again"
    )
  try:
    with np.load(path) as arrays:  # an older version wrote plain names
      return {name.removeprefix(_SKILL): found for name, found in arrays.items()}
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"{path} is damaged ({error}); delete evaluation.json beside it and run again") from error
