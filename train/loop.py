"""The story of a training run, read from top to bottom.

Where a run starts from, in this order: the newest checkpoint in its workdir; `config.init_from` (a run's workdir, a
stage in it, or weights in Hugging Face's form): parameters only; scratch. What was taken is printed.
"""

import functools
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data.pipeline import Stream, build_stream
from data.tasks import read_task_rows
from data.tokenizer import Tokenizer
from models import MODELS, Model
from models.model import learned_positions
from models.sharding import make_mesh, on_mesh
from train import processes, replay, stage
from train.account import Account, record_of
from train.anomalies import check_finite
from train.checkpoint import Checkpoints, with_layout
from train.exits import Stopped
from train.flops import model_flops, row_lengths
from train.guard import Notice, Watchdog, ends_together
from train.log import Log
from train.meter import Meter, Profile
from train.moments import check_memory, kept_away
from train.optimizer import build_optimizer
from train.programs import batch_like, compile_steps, make_train_step, task_gradients_every
from train.stage import Materials
from train.step import State, new_norms
from train.tuning import about, build_tuning
from train.validation import Validation, check_validation

IN_FLIGHT = 2  # steps dispatched and not yet waited for; CPU devices deadlock with many, pods run out of memory


class Run(NamedTuple):
  """A finished stage.

  Attributes:
    model: its model.
    params: its parameters, on the mesh, after its last step or the best one (`config.train.best_metric`); adapters are
      merged.
    mesh: the mesh.
    record: steps, tokens, seconds, the input's counts and the best step, as in the last checkpoint.
  """

  model: Model
  params: Any
  mesh: Mesh
  record: dict[str, Any]


@ends_together()
def train(config: ConfigDict, workdir: str | Path, materials: Materials, name: str = "train") -> Run:
  """Trains one stage to `config.train.steps`, going on from whatever the workdir holds.

  Args:
    config: the resolved config.
    workdir: the stage's folder.
    materials: tokenizer, domain and texts.
    name: of the stage, for the terminal.

  Returns:
    The finished run. A run that was finished before is loaded, not trained.

  Raises:
    ValueError: the config or the input differs from the one that the checkpoint in workdir was made with.
    Stopped: asked to, by a signal, or because every step has to be skipped; what was reached is saved.
  """
  workdir, measured = Path(workdir), check_validation(config, materials.domain.tasks)
  check_config(config, materials.tokenizer)
  stage.check_description(workdir, config, materials)
  mesh = make_mesh(config.mesh)
  model = build_model(config, materials.tokenizer)
  with jax.set_mesh(mesh):
    sources = dict(materials.sources)
    if replay.asked_for(config):
      sources[replay.NAME] = replay.replay_texts(config, workdir, materials.tokenizer, model, mesh)

  def read() -> tuple[Stream, dict[str, str]]:
    rows = {f"validation.{name}": read_task_rows(task, "validation").digest() for name, task in measured.items()}
    return build_stream(config, materials.tokenizer, materials.domain, materials.general, sources), rows

  stream, rows = processes.together(read)  # one host's cache may have what another's lacks
  print("\n".join(stream.about()), flush=True)
  if said := still_warming_up(config):
    print(f"warning: {said}", flush=True)
  stage.check_same_everywhere({**stream.fingerprint(), **rows}, config)
  watchdog, kept = Watchdog(config.train.watchdog_seconds), config.train.keep_checkpoints
  validation = Validation(config, measured, model, materials.tokenizer)
  with jax.set_mesh(mesh), watchdog, Checkpoints(workdir, kept, writes=True) as checkpoints:
    state, record = start(config, model, mesh, checkpoints, stream, name)
    stage.write_description(workdir, config, materials)  # what is refused has changed nothing
    if int(record["steps"]) < config.train.steps:
      parts = (model, mesh, checkpoints, stream)
      state, record = run_steps(config, workdir, name, *parts, state, record, watchdog, validation)
    else:
      print(f"{name}: {record['steps']} of {config.train.steps} steps are done", flush=True)
      if checkpoints.latest() is None:  # a stage of no steps is what it starts from
        record |= record_of(stream, stream.state(), record["steps"], record["tokens"], record["seconds"])
        checkpoints.save(0, stored(config, state), record)
  best = record.get("best", {"step": record["steps"]})
  with jax.set_mesh(mesh):
    if best["step"] == record["steps"]:
      params = jax.jit(build_tuning(config).merge, donate_argnums=1)(state["params"], state["frozen"])
    else:
      del state  # makes room
      params = stage.load_params(workdir, model, mesh)
      print(f"{name}: parameters of step {best['step']}, the best by {best['skill']}: {best['value']:.3f}", flush=True)
  return Run(model, params, mesh, record)


def check_config(config: ConfigDict, tokenizer: Tokenizer) -> None:
  """Refuses what could not be trained, before anything is: model, what of it is trained, optimizer, batches, intervals.

  Raises:
    ValueError: names the key.
  """
  settings = config.train
  least = {"log_every_steps": 1, "checkpoint_every_steps": 1, "keep_checkpoints": 1, "max_skipped_steps": 1}
  least |= {"accumulation_steps": 1, "loss_chunk_tokens": 1, "prefetch_batches": 0, "steps": 0, "z_loss": 0}
  for key, value in least.items():
    if settings[key] < value:
      raise ValueError(f"config.train.{key} is {settings[key]}; expected {value} or more")
  if config.data.batch_size < 1:
    raise ValueError(f"config.data.batch_size is {config.data.batch_size}; expected 1 row or more")
  mesh, model = make_mesh(config.mesh), build_model(config, tokenizer)
  positions = learned_positions(model)
  if positions and config.data.decoder_length > positions:
    raise ValueError(
      f"config.data.decoder_length is {config.data.decoder_length}, but the model has learned positions for rows of "
      f"{positions} tokens; make rows shorter, or take a model with rotary positions"
    )
  make_train_step(config, model, mesh, tasks=1)
  task_gradients_every(config)
  check_memory(config.optimizer.offload, mesh)
  with jax.set_mesh(mesh):  # shapes alone, in a fraction of a second
    state_like(config, model, mesh)  # what is trained, and whether the optimizer can
    model.paths(batch_like(config, tokenizer, mesh), training=True)  # rows, and attention
  Watchdog(settings.watchdog_seconds)
  if settings.steps:
    Profile(Path(), settings.profile_first_step, settings.profile_steps, 0, settings.steps)
  if replay.asked_for(config):
    replay.choice_of(config)
  if settings.spike_factor and settings.spike_factor <= 1:
    factor = settings.spike_factor
    raise ValueError(f"config.train.spike_factor is {factor}; expected more than 1, such as 10, or 0: no spikes")


def still_warming_up(config: ConfigDict) -> str:
  """Says that a stage ends before its learning rate has come down from its peak, or reached it; "" = it does not."""
  warmup, steps = config.optimizer.warmup_steps, config.train.steps
  if config.optimizer.schedule not in ("constant", "cosine", "linear") or not 0 < steps <= warmup:
    return ""
  stays = config.optimizer.schedule == "constant"
  missed = "it never reaches its peak" if stays else "it never comes down from a peak"
  return f"the learning rate warms up for {warmup} steps, and the stage has {steps}: {missed}"


def build_model(config: ConfigDict, tokenizer: Tokenizer) -> Model:
  """Builds `config.model` for a tokenizer; the same settings give the same object, so compiled programs are shared.

  Raises:
    ValueError: unknown architecture, size or field.
  """
  if config.architecture not in MODELS:
    raise ValueError(f"config.architecture is {config.architecture!r}; known: {sorted(MODELS)}")
  names = ("dtype", "storage", "dropout", "remat", "scan_unroll", "attention", "attention_block")
  fields = {key: config.model[key] for key in names}
  fields |= {key: tuple(v) if isinstance(v, list) else v for key, v in config.model.overrides.to_dict().items()}
  vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
  return _build_model(config.architecture, config.model.size, vocab_size, tuple(sorted(fields.items())))


@functools.cache
def _build_model(architecture: str, size: str, vocab_size: int, fields: tuple) -> Model:
  return MODELS[architecture](size, vocab_size, **dict(fields))


@ends_together()
def start(
  config: ConfigDict, model: Model, mesh: Mesh, checkpoints: Checkpoints, stream: Stream, name: str
) -> tuple[State, dict[str, Any]]:
  """Makes the state to start from and puts the stream where it belongs.

  Returns:
    The state and the run record: steps, tokens and seconds so far.

  Raises:
    ValueError: the checkpoint's input is not this config's.
  """
  newest = checkpoints.latest()
  if newest is not None:
    record = checkpoints.restore_run(newest)
    if missing := {"fingerprint", "stream"} - set(record):
      raise ValueError(
        f"checkpoint {newest} in {checkpoints.folder} lacks {sorted(missing)}: where its input stood is lost"
      )
    stage.check_same_input(record["fingerprint"], stream.fingerprint(), checkpoints.folder)
    stream.restore(record["stream"])
    if "best" in record and not checkpoints.has(record["best"]["step"]):
      print(f"{name}: the best step is looked for anew, from step {newest} on", flush=True)
      del record["best"]
    checkpoints.pin(record.get("best", {}).get("step"))
    print(f"{name}: going on from step {newest} in {checkpoints.folder}", flush=True)
    tuning, like = build_tuning(config), state_like(config, model, mesh)
    like["params"] = tuning.store(like["params"], like["frozen"])
    state = checkpoints.restore_state(newest, like)
    if tuning.partial:
      state["frozen"] = stage.load_frozen(config, checkpoints.folder.parent, record, model, mesh)
    else:
      state["params"], state["frozen"] = tuning.split(state["params"])
    return with_norms(config, state, mesh, record), record
  if config.init_from:
    params = stage.load_params(config.init_from, model, mesh)
    print(f"{name}: parameters from {config.init_from}", flush=True)
  else:
    params = stage.scratch_params(config, model, mesh)
    print(f"{name}: parameters from scratch, seed {config.seed}", flush=True)
  state, record = new_state(config, params, mesh), {"steps": 0, "tokens": 0, "seconds": 0.0}
  record["base"] = stage.identity(stage.find(config.init_from)) if config.init_from else {}
  if build_tuning(config).partial and not config.init_from:
    print(f"{name}: WARNING adapters beside random weights learn little; set config.init_from", flush=True)
  print(f"{name}: {about(state['params'], state['frozen'])}", flush=True)
  return state, record


def new_state(config: ConfigDict, params: Any, mesh: Mesh) -> State:
  """Returns the state of a stage that starts from `params`; call under `jax.set_mesh(mesh)`."""
  trained, frozen = build_tuning(config).split(params)
  opt = jax.jit(build_optimizer(config.optimizer, config.train.steps).init)(trained)
  step = jax.device_put(np.int32(0), NamedSharding(mesh, P()))
  return with_norms(config, {"params": trained, "frozen": frozen, "opt": opt, "step": step}, mesh, {})


def with_norms(config: ConfigDict, state: State, mesh: Mesh, record: dict[str, Any]) -> State:
  """Adds the gradient norms of the last steps, as the record has them, where spikes are looked for."""
  if not config.train.spike_factor:
    return state
  norms = np.asarray(record.get("norms", new_norms()), np.float32)
  return {**state, "norms": jax.device_put(norms, NamedSharding(mesh, P()))}


def state_like(config: ConfigDict, model: Model, mesh: Mesh) -> Any:
  """Returns shapes, types and layout of the state, without making it."""
  optimizer = build_optimizer(config.optimizer, config.train.steps)
  params, frozen = (stage.laid_out(part, mesh) for part in build_tuning(config).like(stage.params_like(model, mesh)))
  opt = with_layout(jax.eval_shape(optimizer.init, params), mesh)
  if config.optimizer.offload:
    opt = kept_away(opt, config.optimizer.offload)
  whole = NamedSharding(mesh, P())
  like = {"params": params, "frozen": frozen, "opt": opt, "step": jax.ShapeDtypeStruct((), np.int32, sharding=whole)}
  if config.train.spike_factor:
    like["norms"] = jax.ShapeDtypeStruct(new_norms().shape, np.float32, sharding=whole)
  return like


def stored(config: ConfigDict, state: State) -> State:
  """Returns the state as a checkpoint holds it: with what is frozen among the parameters, unless it is left out."""
  return {**state, "params": build_tuning(config).store(state["params"], state["frozen"])}


@ends_together()
def run_steps(
  config: ConfigDict,
  workdir: Path,
  name: str,
  model: Model,
  mesh: Mesh,
  checkpoints: Checkpoints,
  stream: Stream,
  state: State,
  record: dict[str, Any],
  watchdog: Watchdog,
  validation: Validation,
) -> tuple[State, dict[str, Any]]:
  """Steps from the record's step to the last one.

  Metrics are fetched late, and only those that are recorded; nothing else waits for the device. Batches come from a
  thread that has laid them out on the mesh already.
  """
  settings, first = config.train, record["steps"]
  profile = Profile(workdir / "profile", settings.profile_first_step, settings.profile_steps, first, settings.steps)
  log = Log(workdir, name, first, settings.steps, record.get("evaluated", 0))
  meter = Meter(step_flops(config, model, mesh), mesh.devices.flat)
  measure = functools.partial(validation.measure, log=log, meter=meter, watchdog=watchdog, checkpoints=checkpoints)
  account = Account(config, workdir, stream, record, log, meter)
  make_programs = functools.partial(compile_steps, config, model, mesh, len(stream.task_names))
  in_flight = min(IN_FLIGHT, settings.max_skipped_steps - 1)  # none follows the last one that may be skipped
  pending: deque[tuple[int, dict, dict, int, dict]] = deque()
  batches = ahead(stream, settings.prefetch_batches, settings.steps - first, functools.partial(prepare, mesh))
  with Notice() as notice, closing(log), closing(profile), closing(batches):
    record = measure(first, state, record) if validation.owed(record) else record
    for done in range(first + 1, settings.steps + 1):
      (batch, *host), position = meter.wait_for(batches)
      if done == first + 1:
        print(f"{name}: attention by {model.paths(batch, training=True)}".replace("'", ""), flush=True)
        step = make_programs(state, batch, name)  # further batches are made meanwhile
        meter.start(first)
      with profile.step(done):
        state, metrics = step(done, state, batch)
      profile.after(done, metrics)
      pending.append((done, metrics, *host, position))
      asked = notice.reached()
      due, last = not done % settings.checkpoint_every_steps, done == settings.steps
      measured = validation.due(done) and (last or not asked)  # a run that is asked to stop is when it goes on
      drained = asked or due or last or measured
      while len(pending) > (0 if drained or account.anomalies.counts["in_a_row"] else in_flight):
        account.settle(*pending.popleft())
      if account.anomalies.too_many:
        if account.good[0] > record["steps"]:
          save_checkpoint(checkpoints, stored(config, state), record | account.record_of_good(state), name)
        raise account.anomalies.stopped(name, account.good[0])
      record = measure(done, state, record) if measured else record
      best = record.get("best", {}).get("step") == done
      if asked or last or best or (due and not account.anomalies.counts["in_a_row"]):
        watchdog.slow(f"saving step {done}")
        record = {**record, **account.record(done, position, state)}
        save_checkpoint(checkpoints, stored(config, state), record, name)
      if asked:
        raise Stopped(f"{name}: stopped by {asked} after step {done}, which is saved; the same command goes on there")
      watchdog.step(done + 1) if done > first + IN_FLIGHT else watchdog.slow(f"step {done + 1}")
    watchdog.slow("the last save")
  print(f"{name}: {shares_line(stream.shares(record['stream']), record['counts'])}", flush=True)
  return state, record


def save_checkpoint(checkpoints: Checkpoints, state: State, record: dict[str, Any], name: str) -> None:
  """Starts the save of a record's step, if all of the state is finite."""
  check_finite(state, name, record["steps"])
  checkpoints.save(record["steps"], state, record)


def prepare(mesh: Mesh, batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], dict[str, np.ndarray], int]:
  """Returns a batch laid out on the mesh, as it was, and its checksum; for the thread that makes batches."""
  with jax.set_mesh(mesh):
    return on_mesh(batch), batch, checksum_of(batch)


def step_flops(config: ConfigDict, model: Model, mesh: Mesh) -> int:
  """Returns the model's FLOPs in a step of the config, by `train/flops.py`."""
  shapes = stage.params_like(model, mesh)
  frozen = build_tuning(config).like(shapes)[1]
  return model_flops(model, shapes, config.data.batch_size, *row_lengths(config), frozen)


def shares_line(shares: dict[str, dict[str, float]], counts: dict[str, dict[str, float]]) -> str:
  """Returns asked and achieved shares and the packing in one line.

  Example:
    >>> shares_line({"asked": {"a": 0.5}, "achieved": {"a": 0.48}}, {"packing": {"efficiency": 0.97}})
    'share asked and achieved: a 50.0 % 48.0 %; rows filled 97 %'
  """
  parts = [f"{task} {share:.1%} {shares['achieved'][task]:.1%}" for task, share in shares["asked"].items()]
  filled = f"{counts['packing']['efficiency']:.0%}"
  return f"share asked and achieved: {', '.join(parts)}; rows filled {filled}".replace("%", " %")


def ahead(
  stream: Stream, count: int, steps: int, prepare: Callable[[dict[str, np.ndarray]], Any] = lambda batch: batch
) -> Iterator[tuple[Any, dict]]:
  """Yields `steps` batches with the stream's state after each, made up to `count` ahead by one thread.

  Args:
    stream: of batches.
    count: how many.
    steps: in all.
    prepare: what the thread makes of a batch, such as arrays on the mesh.
  """

  def make() -> tuple[Any, dict]:
    batch = next(stream)
    return prepare(batch), stream.state()

  with ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
    futures = deque(executor.submit(make) for _ in range(min(count + 1, steps)))
    for number in range(steps):
      yield futures.popleft().result()
      if number + len(futures) + 1 < steps:
        futures.append(executor.submit(make))


def checksum_of(batch: dict[str, np.ndarray]) -> int:
  """Returns a CRC-32 of a batch, so that two runs can be seen to have had the same one."""
  return functools.reduce(lambda crc, key: zlib.crc32(np.ascontiguousarray(batch[key]), crc), sorted(batch), 0)
