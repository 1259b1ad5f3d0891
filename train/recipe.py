"""The recipe: base, continued pre-training, multitask fine-tuning, arms to compare; each evaluated; a report.

workdir/domain/          the embedded domain, where config.domain is "sample"
workdir/tokenizer/       the trained tokenizer, where config.tokenizer.path is "train"
workdir/stages/NAME/     see train/stage.py; and of the stage's evaluation:
  calibration.json       task -> temperature, threshold, see train/calibration.py
  scores.npz             skill -> parts of the headline, example by example, see train/evaluate.py
  evaluation.json        metrics and samples; written last: it marks a stage that is done and is not run again
workdir/report.{json,html}
"""

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data import sample
from data.cache import cache_folder, programs_folder
from data.components import form_of_pieces, held_out_objective
from data.pipeline import Stream, build_stream, held_out_batches
from data.prompts import check_labels
from data.sources import Texts, open_texts, texts_of
from data.tasks import RESERVED, Domain, Task, hold_out, load_domain
from data.tokenizer import Tokenizer, is_saved, load_tokenizer, train_tokenizer
from models.sharding import whole_batch
from train import evaluate, gate, loop, processes, replay, statistics
from train.arms import Stage, plan_stages, stage_config
from train.averaging import average_stages
from train.baselines import baselines
from train.checkpoint import Checkpoints
from train.collect import build_report, outline
from train.evaluator import Evaluator
from train.metrics import DECODING, VALUES, headline
from train.report import write_report
from train.skills import Skills, build_skills, describe_skills
from train.stage import (
  Materials,
  check_description,
  check_same_input,
  differences,
  find,
  identity,
  inherit,
  write_json,
)
from train.validation import check_validation


def run_recipe(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Runs every stage that is not done yet, evaluates it, and writes the report.

  Args:
    config: with `stages`, `arms`, `gate` and `retain`.
    workdir: the recipe's folder.

  Returns:
    The report; where there are rules, its "gate" says whether they are met.

  Raises:
    ValueError: a stage, arm or rule that cannot be; another config than the one the workdir was made with.
  """
  workdir = Path(workdir)
  prepare_jax(config)
  processes.check_shared(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  config = inherit(config)
  materials = load_materials(config, workdir)
  stages, skills = plan_stages(config, materials.domain), build_skills(config, materials)
  rules = read_gate(config, stages, skills)
  evaluate.check_evaluation(config.evaluate, skills.tasks)
  form_of_pieces(held_out_objective(config), config, materials.tokenizer)
  inputs = {}
  for stage in stages:  # every text is read, and every row and setting checked, before the first long run
    if not stage.average_with:
      own, stream = open_stage(config, workdir, stage, materials)
      loop.check_config(own, materials.tokenizer)
      inputs[stage.name] = stream.fingerprint()
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
  written = json.loads((workdir / "report.json").read_text())
  print("\n".join([*gate.lines(written["gate"]), ""] if rules else []), end="", flush=True)
  print(f"report: {workdir / 'report.html'}", flush=True)
  return written


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
  """
  cache, bad_rows = cache_folder(config.data.cache_dir), config.data.bad_rows
  domain = load_domain(domain_folder(config, workdir), config.tasks.to_dict(), config.data.cache_dir, bad_rows)
  evaluate.check_evaluation(config.evaluate, domain.tasks)
  general, general_test = open_general(config.general, cache, bad_rows)
  sources = {name: open_texts(source, cache, bad_rows) for name, source in config.sources.to_dict().items()}
  if taken := set(sources) & {*RESERVED, *domain.tasks}:
    raise ValueError(f"config.sources has {sorted(taken)}: these names mean something else in a mixture; rename them")
  tokenizer = find_tokenizer(config, workdir, domain, general)
  check_labels(domain.tasks.values(), tokenizer)
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
    same = about.exists() and json.loads(about.read_text()) == made_of
    if not processes.agree(is_saved(path) and (same or has_stages(workdir))):
      texts = itertools.chain(domain.corpus, general or [])
      print(f"training a tokenizer of {config.tokenizer.vocab_size} tokens on the domain and general text", flush=True)

      def make() -> None:
        train_tokenizer(texts, **settings).save(path)
        write_json(about, made_of)

      processes.first(make)
  return load_tokenizer(path)


def has_stages(workdir: Path) -> bool:
  """Says whether anything in a workdir has been trained, or begun to be."""
  return (workdir / "config.json").exists() or any(workdir.glob("stages/*/config.json"))


def open_general(source: Any, cache: Path, bad_rows: str) -> tuple[Texts | None, Texts | None]:
  """Returns training and held-out documents of the general text: "python", a source, or "" for none."""
  if not source:
    return None, None
  if source == "python":
    train, held = sample.general_texts()
    return texts_of(train, "python"), texts_of(held, "python")
  texts = open_texts(source.to_dict() if isinstance(source, ConfigDict) else source, cache, bad_rows)
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
    result = json.loads(done.read_text())
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


def stored_record(folder: Path) -> dict[str, Any] | None:
  """Returns the record of a stage's run, as far as it is; None where there is no step of it."""
  done = folder / "evaluation.json"
  if processes.agree(done.exists()):
    return json.loads(done.read_text())["run"]
  if not processes.agree((folder / "checkpoints").is_dir()):
    return None
  with Checkpoints(folder) as checkpoints:
    newest = checkpoints.latest()
    return None if newest is None else checkpoints.restore_run(newest)


def check_made_of(
  run: Mapping[str, Any], config: ConfigDict, stage: Stage, input_now: Mapping[str, Any] | None, folder: Path
) -> None:
  """Refuses a stage, done or begun, that was made of other parameters or texts than those that are there now.

  Args:
    run: its record, as it was stored; an older version stored less: what it lacks is not compared.
    config: of the stage, now.
    stage: as it is planned now.
    input_now: the fingerprint of what it would train on now; None of an average.
    folder: of the stage.

  Raises:
    ValueError: says what differs, and what to delete.
  """
  if stage.average_with:
    then = run.get("averaged", {}).get("from")
    now = [identity(folder.parent / name) for name in (stage.average_with, stage.init_from)]
  else:
    then = now = run.get("base")
    with contextlib.suppress(FileNotFoundError):  # what a finished stage began with may be gone
      now = identity(find(config.init_from)) if config.init_from else {}
    both = (run.get("fingerprint", input_now), input_now)
    # What is sampled comes from `base`, which is compared; a stage that is done is the same in any order of tasks.
    free = (f"source.{replay.NAME}", "order")
    check_same_input(*({key: found[key] for key in found if key not in free} for found in both), folder)
  if then is not None and then != now:
    start = f"{stage.average_with} and {stage.init_from}" if stage.average_with else config.init_from or "scratch"
    raise ValueError(
      f"{folder} was made from other parameters than those of {start} now ({then} then, {now} now): delete that "
      "folder, and those of the stages that start from it, to make them anew; or put back what it was made from"
    )


def check_same_rows(result: Mapping[str, Any], stage: Stage, skills: Skills, where: Path) -> None:
  """Refuses an evaluation on other test rows than those of now, by other prompts, or of another average.

  Args:
    result: as it was stored; an older version stored no `rows` or `asked`: then they are not compared.
    stage: as it is planned now.
    skills: as they are now.
    where: the file that it was stored in, for the error.

  Raises:
    ValueError: says what differs.
  """
  for name, digest in skills.digests.items():
    if result.get("rows", {}).get(name, digest) != digest:
      raise ValueError(
        f"{where} measured {name!r} on other test rows than those of now (the files, or how many are measured, have "
        "changed): stages could not be compared row by row; delete that file in every stage to measure again (nothing "
        "is trained again), or put the rows back"
      )
  now = {name: skills.asked[name] for name in result.get("asked", {}) if name in skills.asked}
  if lines := differences({name: result["asked"][name] for name in now}, now):
    raise ValueError(
      f"{where} measured tasks that were asked otherwise than now:\n  " + "\n  ".join(lines) + "\nstages could not be "
      "compared row by row; delete that file in every stage to measure again (nothing is trained again), or put it back"
    )
  if missing := [name for name in skills.texts if name not in result["skills"]]:
    raise ValueError(f"{where} lacks {missing}; delete that file to measure again (nothing is trained again)")
  then = result["run"].get("averaged", {}).get("with", "")
  if then != stage.average_with:
    raise ValueError(
      f"{where} measured an average with {then!r}, {stage.average_with!r} is asked for now; delete its folder"
    )


def check_measured(skills: Mapping[str, Any], tasks: Mapping[str, Task], config: ConfigDict, where: Path) -> None:
  """Refuses an evaluation that does not hold what is asked for now.

  Args:
    skills: metrics by skill, as they were stored.
    tasks: by name, as they are now.
    config: `evaluate` is read.
    where: the file that they were stored in, for the error.

  Raises:
    ValueError: a task was not measured, or by another headline, label score, target accuracy or way of answering; or
      a perplexity under another objective.
  """
  settings, objective = config.evaluate, held_out_objective(config)
  measured = {}  # skill -> how it was, and is, measured
  for name, found in skills.items():
    if "perplexity" in found:  # an older version did not store its objective
      measured[name] = {"objective": found.get("objective", objective)}, {"objective": objective}
  for name, task in tasks.items():
    found = skills.get(name, {})
    then = {"metric": found.get("metric")}
    now: dict[str, Any] = {"metric": headline(task.kind, task.metrics)}
    if task.kind == "classification":
      fitted = found.get("calibration", {})
      then |= {key: fitted.get(key) for key in ("label_score", "target_accuracy")}
      now |= {"label_score": task.label_score or settings.label_score, "target_accuracy": settings.target_accuracy}
    if task.kind == "generation":
      then |= {name: found.get(name, plain) for name, plain in DECODING.items()}
      now |= {name: settings[name] for name in DECODING}
    measured[name] = then, now
  for name, (then, now) in measured.items():
    if then != now:
      raise ValueError(
        f"{where} measured {name!r} with {then}, and {now} is asked for now; delete that file to measure again "
        "(nothing is trained again), or ask for what it has"
      )


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
  """
  evaluate.check_evaluation(evaluator.config.evaluate, tasks)
  measured, metrics = {}, dict.fromkeys(held_out, "perplexity")
  for name, texts in held_out.items():
    rows = whole_batch(evaluator.config.evaluate.batch_size)
    batches, size = held_out_batches(texts, evaluator.tokenizer, measure or evaluator.config, rows)
    measured[name] = evaluate.perplexity(evaluator, iter(batches), size)
  for name, task in tasks.items():
    measured[name] = evaluate.evaluate_task(evaluator, task, split)
    metrics[name] = headline(task.kind, task.metrics)
  for name, found in measured.items():
    found.metrics["interval"] = statistics.interval(found.parts, VALUES[metrics[name]])
    if found.calibration and found.calibration.note:
      print(f"evaluation: {name}: {found.calibration.note}", flush=True)
  shown = "  ".join(f"{name} {found.metrics['value']:.3f}" for name, found in measured.items())
  print(f"evaluation: {shown}", flush=True)
  if evaluator.cut:
    print(f"evaluation: {len(evaluator.cut)} prompts were cut to fit rows of {evaluator.row} tokens", flush=True)
  return measured


def write_scores(folder: Path, parts: Mapping[str, np.ndarray]) -> None:
  """Writes the parts of each skill's headline; a reader never sees half of it."""
  part = folder / "scores.npz.part"
  with part.open("wb") as file:
    np.savez_compressed(file, **parts)
  os.replace(part, folder / "scores.npz")


def read_scores(folder: Path) -> dict[str, np.ndarray]:
  """Reads what `write_scores` wrote.

  Raises:
    FileNotFoundError: the stage was evaluated by a version of Argot that did not write it.
  """
  path = folder / "scores.npz"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing: an older version evaluated that stage; delete evaluation.json beside it and run again"
    )
  with np.load(path) as arrays:
    return dict(arrays)
