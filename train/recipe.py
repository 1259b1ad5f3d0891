"""The recipe: base, continued pre-training, multitask fine-tuning, arms to compare; each evaluated; a report.

workdir/domain/          the embedded domain, where config.domain is "sample"
workdir/tokenizer/       the trained tokenizer, where config.tokenizer.path is "train"
workdir/stages/NAME/     see train/stage.py; and of the stage's evaluation:
  calibration.json       task -> temperature, threshold, see train/calibration.py
  scores.npz             skill -> parts of the headline, example by example, see train/evaluate.py
  evaluation.json        metrics and samples; written last: it marks a stage that is done and is not run again
workdir/report.{json,html}
"""

import datetime
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from data import sample
from data.cache import cache_folder, programs_folder
from data.pipeline import build_stream, held_out_batches
from data.sources import Texts, open_texts, texts_of
from data.tasks import RESERVED, Domain, Task, hold_out, load_domain
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from train import evaluate, loop, processes, replay, statistics
from train.baselines import baselines
from train.log import read_metrics, read_validation
from train.metrics import VALUES, headline, higher_is_better
from train.report import write_report
from train.stage import Materials, flat, inherit, write_description, write_json
from train.validation import check_validation

MAIN_LINE = ("base", "continued", "multitask")


class Stage(NamedTuple):
  """One training run of the recipe.

  Attributes:
    name: as in the report.
    init_from: the stage it starts from; "" is scratch (or `config.init_from`).
    like: the main stage whose settings it takes.
    mixture: instead of that stage's, or None.
    steps: instead of that stage's; 0 = the same.
  """

  name: str
  init_from: str
  like: str
  mixture: Mapping[str, float] | None = None
  steps: int = 0


def run_recipe(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Runs every stage that is not done yet, evaluates it, and writes the report.

  Args:
    config: with `stages` and `arms`.
    workdir: the recipe's folder.

  Returns:
    The report.

  Raises:
    ValueError: a stage or arm that cannot be; another config than the one the workdir was made with.
  """
  workdir = Path(workdir)
  prepare_jax(config)
  processes.check_shared(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  config = inherit(config)
  materials = load_materials(config, workdir)
  stages = plan_stages(config, materials.domain)
  held_out = {"domain": materials.domain.corpus_test}
  if materials.general_test:
    held_out = {"general": materials.general_test, **held_out}
  for stage in stages:  # every text is read and every row checked before the first long run
    own = stage_config(config, stage, workdir)
    check_validation(own, materials.domain.tasks)
    sources = {**materials.sources, replay.NAME: replay.stand_in()}
    build_stream(own, materials.tokenizer, materials.domain, materials.general, sources)
  results = {}
  for stage in stages:
    results[stage.name] = run_stage(config, workdir, stage, materials, held_out)

    def report() -> None:
      scores = {name: read_scores(workdir / "stages" / name) for name in results}
      write_report(build_report(config, stages, materials, held_out, results, workdir), workdir, scores)

    processes.first(report)
  print(f"report: {workdir / 'report.html'}", flush=True)
  return json.loads((workdir / "report.json").read_text())


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
  return Materials(find_tokenizer(config, workdir, domain, general), domain, general, general_test, sources)


def domain_folder(config: ConfigDict, workdir: Path) -> Path:
  """Returns the domain's folder; writes the embedded one where the config asks for it."""
  if config.domain != "sample":
    return Path(config.domain)
  folder = workdir / "domain" / "sample"
  if not processes.agree((folder / "tasks.json").exists()):  # written last
    processes.first(lambda: sample.write_domain(folder, seed=config.seed))
  return folder


def find_tokenizer(config: ConfigDict, workdir: Path, domain: Domain, general: Texts | None) -> Tokenizer:
  """Loads the tokenizer that the config names; trains one where it asks for that."""
  path = config.tokenizer.path
  if path == "train":
    path = str(workdir / "tokenizer")
    if not processes.agree(Path(path).exists()):
      texts = itertools.chain(domain.corpus, general or [])
      print(f"training a tokenizer of {config.tokenizer.vocab_size} tokens on the domain and general text", flush=True)
      settings = (config.tokenizer.vocab_size, config.tokenizer.sentinels)
      processes.first(lambda: train_tokenizer(texts, *settings).save(path))
  return load_tokenizer(path)


def open_general(source: Any, cache: Path, bad_rows: str) -> tuple[Texts | None, Texts | None]:
  """Returns training and held-out documents of the general text: "python", a source, or "" for none."""
  if not source:
    return None, None
  if source == "python":
    train, held = sample.general_texts()
    return texts_of(train, "python"), texts_of(held, "python")
  return hold_out(open_texts(source.to_dict() if isinstance(source, ConfigDict) else source, cache, bad_rows))


def plan_stages(config: ConfigDict, domain: Domain) -> list[Stage]:
  """Lists the stages and arms in the order they run.

  Raises:
    ValueError: an unknown name in `arms.only`.
  """
  stages = [Stage("base", "", "base"), Stage("continued", "base", "continued")]
  stages.append(Stage("multitask", "continued", "multitask"))
  stages += [
    Stage(f"only_{task}", "continued", "multitask", {task: 1.0}, config.arms.only_steps)
    for task in lone_tasks(config, domain)
  ]
  if config.arms.without_continued:
    stages.append(Stage("multitask_without_continued", "base", "multitask"))
  return stages


def lone_tasks(config: ConfigDict, domain: Domain) -> list[str]:
  """Returns the tasks that get an arm of their own: `config.arms.only`."""
  asked, tasks = config.arms.only, list(domain.tasks)
  if asked in ("all", "none"):
    return tasks if asked == "all" else []
  if asked == "one_of_each":
    kinds = {domain.tasks[name].kind: name for name in reversed(tasks)}
    return [name for name in tasks if name in kinds.values()]
  chosen = [name for name in asked.split(",") if name]
  if unknown := set(chosen) - set(tasks):
    raise ValueError(f"config.arms.only names {sorted(unknown)}; tasks are {tasks}, or 'all', 'none', 'one_of_each'")
  return chosen


def stage_config(config: ConfigDict, stage: Stage, workdir: Path) -> ConfigDict:
  """Returns the full config of a stage: the recipe's, with what differs in that stage.

  Raises:
    ValueError: `config.stages` changes a key that does not exist.
  """
  result = config.copy_and_resolve_references()
  different = config.stages[stage.like].to_dict()
  if unknown := set(flat(different)) - set(flat(config.to_dict())) - _mixture_keys(different):
    raise ValueError(f"config.stages.{stage.like} has unknown {sorted(unknown)}; keys are those of configs/base.py")
  with result.unlocked():
    mixture = stage.mixture or different.get("data", {}).get("mixture") or config.data.mixture.to_dict()
    result.update(different)
    result.data.mixture = ConfigDict(dict(mixture))
    result.train.steps = stage.steps or result.train.steps
    if stage.mixture and result.train.best_metric:
      result.train.best_metric = next(iter(stage.mixture))  # an arm on one task is as good as it is there
    result.stages = ConfigDict()
    if stage.init_from:
      result.init_from = str(workdir / "stages" / stage.init_from)
  return result.lock()


def _mixture_keys(different: Mapping[str, Any]) -> set[str]:
  return {f"data.mixture.{name}" for name in different.get("data", {}).get("mixture", {})}


def run_stage(
  config: ConfigDict, workdir: Path, stage: Stage, materials: Materials, held_out: Mapping[str, Texts]
) -> dict[str, Any]:
  """Trains and evaluates a stage, or reads the evaluation of one that is done.

  Returns:
    `run` (steps, tokens, seconds, counts), `parameters`, `skills` (metrics by skill) and `samples` by task.
  """
  folder = workdir / "stages" / stage.name
  own = stage_config(config, stage, workdir)
  done = folder / "evaluation.json"
  if processes.agree(done.exists()):
    write_description(folder, own, materials)  # refuses another config
    result = json.loads(done.read_text())
    check_measured(result["skills"], materials.domain.tasks, own, done)
    print(f"{stage.name}: done", flush=True)
    return result
  run = loop.train(own, folder, materials, stage.name)
  with jax.set_mesh(run.mesh):
    evaluator = evaluate.Evaluator(own, run.model, run.params, materials.tokenizer)
    measured = evaluate_all(evaluator, materials.domain.tasks, held_out, "test")
  parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
  result = {"run": run.record, "parameters": parameters}
  result["skills"] = {name: found.metrics for name, found in measured.items()}
  result["samples"] = {name: found.samples for name, found in measured.items() if name in materials.domain.tasks}
  fitted = {name: found.calibration._asdict() for name, found in measured.items() if found.calibration}

  def write() -> None:
    write_json(folder / "calibration.json", fitted)
    write_scores(folder, {name: found.parts for name, found in measured.items()})
    write_json(done, result)  # last: a stage that has it is done

  processes.first(write)
  return result


def check_measured(skills: Mapping[str, Any], tasks: Mapping[str, Task], config: ConfigDict, where: Path) -> None:
  """Refuses an evaluation that does not hold what is asked for now.

  Args:
    skills: metrics by skill, as they were stored.
    tasks: by name, as they are now.
    config: `evaluate` is read.
    where: the file that they were stored in, for the error.

  Raises:
    ValueError: a task was not measured, or by another headline, label score or target accuracy.
  """
  for name, task in tasks.items():
    found, settings = skills.get(name, {}), config.evaluate
    then = {"metric": found.get("metric")}
    now: dict[str, Any] = {"metric": headline(task.kind, task.metrics)}
    if task.kind == "classification":
      fitted = found.get("calibration", {})
      then |= {key: fitted.get(key) for key in ("label_score", "target_accuracy")}
      now |= {"label_score": task.label_score or settings.label_score, "target_accuracy": settings.target_accuracy}
    if then != now:
      raise ValueError(
        f"{where} measured task {name!r} with {then}, and {now} is asked for now; delete that file to measure again "
        "(nothing is trained again), or ask for what it has"
      )


def evaluate_all(
  evaluator: evaluate.Evaluator, tasks: Mapping[str, Task], held_out: Mapping[str, Texts], split: str
) -> dict[str, evaluate.Measured]:
  """Measures every skill.

  Args:
    evaluator: the model.
    tasks: by name.
    held_out: documents for perplexity, by skill.
    split: of the tasks.

  Returns:
    What was found by skill; its metrics have `interval` beside `value`: the 95 % interval, None where there is none.
  """
  evaluate.check_evaluation(evaluator.config.evaluate, tasks)
  measured, metrics = {}, dict.fromkeys(held_out, "perplexity")
  for name, texts in held_out.items():
    batches, size = held_out_batches(texts, evaluator.tokenizer, evaluator.config)
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
    print(f"evaluation: {len(evaluator.cut)} prompts were cut to {evaluator.longest_prompt} tokens", flush=True)
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


def build_report(
  config: ConfigDict,
  stages: list[Stage],
  materials: Materials,
  held_out: Mapping[str, Any],
  results: Mapping[str, dict],
  workdir: Path,
) -> dict[str, Any]:
  """Collects the report from the stages that are done; `train/report.py` describes its form."""
  tasks = materials.domain.tasks
  skills = [{"name": name, "kind": "perplexity", "metric": "perplexity"} for name in held_out]
  skills += [
    {"name": name, "kind": task.kind, "metric": headline(task.kind, task.metrics), "labels": list(task.labels)}
    for name, task in tasks.items()
  ]
  for skill in skills:
    skill["higher_is_better"] = higher_is_better(skill["metric"])
  done = [stage for stage in stages if stage.name in results]
  return {
    "domain": materials.domain.name,
    "architecture": config.architecture,
    "size": config.model.size,
    "parameters": results[done[0].name]["parameters"],
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "stages": [describe_stage(stage, results[stage.name]["run"], workdir) for stage in done],
    "skills": skills,
    "matrix": {stage.name: results[stage.name]["skills"] for stage in done},
    "baselines": {name: baselines(task, limit=config.evaluate.max_examples) for name, task in tasks.items()},
    "samples": {name: side_by_side(name, done, results) for name in tasks},
    "mixture": {stage.name: results[stage.name]["run"]["counts"] for stage in done},
  }


def describe_stage(stage: Stage, run: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Returns a stage's row of the report, with its curves."""
  folder = workdir / "stages" / stage.name
  records, measured = read_metrics(folder), read_validation(folder)
  return {
    "name": stage.name,
    "init_from": stage.init_from,
    "kind": "main" if stage.name in MAIN_LINE else "arm",
    "steps": run["steps"],
    "tokens": run["tokens"],
    "seconds": round(run["seconds"], 1),
    "loss": [[r["step"], r["loss"]] for r in records if r["loss"] is not None],
    "task_gradients": [[r["step"], r["task_gradient_share"]] for r in records if "task_gradient_share" in r],
    "validation": [[r["step"], {name: s["value"] for name, s in r["skills"].items()}] for r in measured],
    "best": run.get("best"),
  }


def side_by_side(task: str, stages: list[Stage], results: Mapping[str, dict]) -> list[dict[str, Any]]:
  """Joins the stages' outputs for a task's sample rows."""
  columns = {stage.name: results[stage.name]["samples"][task] for stage in stages}
  rows = next(iter(columns.values()))
  return [
    {**{key: row[key] for key in ("input", "target")}, "outputs": {name: c[i]["output"] for name, c in columns.items()}}
    for i, row in enumerate(rows)
  ]
