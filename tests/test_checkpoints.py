"""Damage done to real checkpoints: it is seen, passed over with a word, or ends the run; nothing is silently wrong."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models.sharding import make_mesh
from scripts import __main__ as command
from scripts import checkpoints as verb
from tests.test_train import ROOT, batches_of, child, config_of, domain, one_cpu, params_of, run  # noqa: F401  fixtures
from train import loop, manifest, stage, upkeep
from train.checkpoint import Checkpoints, NotSaved
from train.log import read_metrics

SHORT = {"train.steps": 12}  # checkpoints at 4, 8 and 12, of which the newest two are kept


@pytest.fixture(scope="module")
def finished(domain, tmp_path_factory):  # noqa: F811
  """A run of 12 steps that was not disturbed, with its parameters."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    done = run(config_of(domain, **SHORT), workdir)
  return workdir, params_of(done)


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run, to be damaged."""
  return Path(shutil.copytree(finished[0], tmp_path / "run"))


def largest(step: Path) -> Path:
  return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path, at: float = 0.5) -> None:
  """Turns one bit of a file over."""
  content = bytearray(file.read_bytes())
  content[int(at * (len(content) - 1))] ^= 0x40
  file.write_bytes(content)


def half(step: Path) -> None:
  for file in sorted(file for file in step.rglob("*") if file.is_file())[::2]:
    file.unlink()


def cut(file: Path) -> None:
  os.truncate(file, file.stat().st_size // 2)


def emptied(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


DAMAGE = {
  "flipped bit": (lambda step: flip(largest(step)), "holds other bytes than were written"),
  "truncated file": (lambda step: cut(largest(step)), "were written"),
  "emptied file": (lambda step: os.truncate(largest(step), 0), "has 0 bytes"),
  "empty folder": (emptied, "manifest.json is missing"),
  "half deleted": (half, "is missing"),
  "no optimizer state": (lambda step: shutil.rmtree(step / "opt"), "opt/.* is missing"),
  "no input state": (lambda step: (step / "run" / "metadata").unlink(), "run/metadata is missing"),
  "flipped manifest": (lambda step: flip(step / "manifest.json", 0.0), "manifest.json cannot be read"),
  "path out of the folder": (
    lambda step: change_manifest(step, files={"../../config.json": [1, "0"]}),
    "which is not in the folder",
  ),
}


def change_manifest(step: Path, **fields) -> None:
  file = step / "manifest.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_passed_over_with_a_word(workdir, kind, capsys):
  damage, message = DAMAGE[kind]
  damage(workdir / "checkpoints" / "12")
  with Checkpoints(workdir) as reader:
    assert reader.latest() == 8
  out = capsys.readouterr().out
  assert "checkpoint 12 in" in out and "passed over" in out
  assert re.search(message, out)
  with Checkpoints(workdir, writes=True) as writer:
    assert writer.latest() == 8
  assert "set aside as 12.damaged" in capsys.readouterr().out
  assert upkeep.steps(workdir / "checkpoints") == [8] and (workdir / "checkpoints" / "12.damaged").is_dir()


def test_a_run_goes_on_from_the_step_before_and_ends_the_same(workdir, finished, domain, one_cpu, capsys):  # noqa: F811
  flip(largest(workdir / "checkpoints" / "12"))
  again = run(config_of(domain, **SHORT), workdir)
  assert "going on from step 8" in capsys.readouterr().out
  assert all((a == b).all() for a, b in zip(params_of(again), finished[1], strict=True))
  assert batches_of(workdir) == batches_of(finished[0]) and len(read_metrics(workdir)) == 12
  assert manifest.problem(workdir / "checkpoints" / "12") == ""


def test_no_whole_step_is_an_error_that_names_each(workdir, domain, one_cpu):  # noqa: F811
  for step in (8, 12):
    flip(largest(workdir / "checkpoints" / str(step)))
  with pytest.raises(ValueError, match=r"(?s)no checkpoint in .* is whole:.*step 12: .*step 8: "):
    run(config_of(domain, **SHORT), workdir)
  assert upkeep.steps(workdir / "checkpoints") == [8, 12]  # nothing was moved


def test_a_newer_format_is_refused(workdir, domain, one_cpu):  # noqa: F811
  change_manifest(workdir / "checkpoints" / "12", format=manifest.FORMAT + 1)
  with pytest.raises(ValueError, match=r"written by a newer Argot: its format is 2, this one reads up to 1; update"):
    run(config_of(domain, **SHORT), workdir)


def test_parameters_for_another_stage_are_verified_too(workdir, domain, tmp_path, one_cpu, capsys):  # noqa: F811
  flip(largest(workdir / "checkpoints" / "12" / "params"))
  config = config_of(domain, **{"train.steps": 1, "init_from": str(workdir)})
  run(config, tmp_path / "next")
  assert "checkpoint 12 in" in capsys.readouterr().out
  flip(largest(workdir / "checkpoints" / "8" / "params"))
  with pytest.raises(ValueError, match="is whole"):
    run(config, tmp_path / "other")


def test_a_stage_that_is_not_finished_says_so(workdir, capsys):
  config, mesh = stage.read_config(workdir), make_mesh({}, jax.devices()[:1])
  model = loop.build_model(config, stage.read_tokenizer(workdir))
  for step, said in ((12, ""), (8, f"{workdir}: step 8 of 12: not finished; the command that trains it goes on\n")):
    upkeep.rollback(workdir / "checkpoints", step)
    with jax.set_mesh(mesh):
      stage.load_params(workdir, model, mesh)
    assert capsys.readouterr().err == said


def test_a_manifest_says_what_it_was_made_with(workdir):
  value = manifest.read(workdir / "checkpoints" / "12")
  assert value["step"] == 12 and value["versions"]["jax"] == jax.__version__
  assert value["config"] == manifest.fingerprint(json.loads((workdir / "config.json").read_text()))
  with Checkpoints(workdir) as reader:
    assert value["input"] == manifest.fingerprint(reader.restore_run(12)["fingerprint"])
  step = workdir / "checkpoints" / "12"
  inside = {file.relative_to(step).as_posix() for file in step.rglob("*") if file.is_file()}
  assert inside - set(value["files"]) == {"manifest.json", *manifest.CHANGED_BY_COMMIT}


def test_what_the_commit_changes_is_not_needed(workdir, domain, one_cpu):  # noqa: F811
  """The two files that no manifest can hold may be damaged: nothing is read from them."""
  for name in manifest.CHANGED_BY_COMMIT:
    flip(workdir / "checkpoints" / "12" / name)
  config = config_of(domain, **SHORT)
  assert params_of(run(config, workdir))


def test_a_step_that_is_not_newer_is_an_error(workdir):
  with Checkpoints(workdir, writes=True) as writer, pytest.raises(NotSaved, match="must be newer than 12"):
    writer.save(12, {"params": {"a": jax.numpy.ones(2)}}, {})


def test_other_leaves_are_named(workdir, finished, domain):  # noqa: F811
  config = stage.read_config(workdir)
  mesh = make_mesh({}, jax.devices()[:1])
  with jax.set_mesh(mesh), Checkpoints(workdir) as reader:
    model = loop.build_model(config, stage.read_tokenizer(workdir))
    like = loop.state_like(config, model, mesh)
    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype, sharding=leaf.sharding), like)
    with pytest.raises(ValueError, match=r"checkpoint 12 in .*: params \S+ is \(.*\), the model's is \("):
      reader.restore_state(12, wide)
    more = like | {"params": like["params"] | {"a_new_part": {"kernel": next(iter(jax.tree.leaves(like["params"])))}}}
    with pytest.raises(ValueError, match=r"params a_new_part/kernel is not there, the model's is"):
      reader.restore_params(12, more["params"])
    with pytest.raises(ValueError, match=r"opt \S+ is \(.*\), the model's is not there"):
      reader.restore_state(12, like | {"opt": ()})


def test_moments_count_and_schedule_are_those_that_were_saved(workdir, domain):  # noqa: F811
  """Restored twice, on another mesh the second time: the optimizer's leaves are the same, its count is the step."""
  config, states = stage.read_config(workdir), []
  tokenizer = stage.read_tokenizer(workdir)
  for devices in (1, 8):
    mesh = make_mesh({"data": 1, "fsdp": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh), Checkpoints(workdir) as reader:
      like = loop.state_like(config, loop.build_model(config, tokenizer), mesh)
      states.append(jax.device_get(reader.restore_state(12, like)))
  for one, other in zip(*map(jax.tree.leaves, states), strict=True):
    assert (one == other).all()
  paths = jax.tree_util.tree_flatten_with_path(states[0]["opt"])[0]
  counts = [leaf for path, leaf in paths if "count" in jax.tree_util.keystr(path)]
  assert counts and all(count == 12 for count in counts)
  assert all(np.any(leaf) for path, leaf in paths if "mu" in jax.tree_util.keystr(path))


def test_weights_without_an_optimizer_are_not_gone_on_from(domain, tmp_path, one_cpu):  # noqa: F811
  config = config_of(domain, **{"train.steps": 2})
  done = run(config, tmp_path)
  with Checkpoints(tmp_path) as reader:
    record = reader.restore_run(2)
  with Checkpoints(tmp_path, writes=True) as writer:
    writer.save(3, {"params": done.params}, record | {"steps": 3})
  with pytest.raises(ValueError, match="checkpoint 3 in .* has no opt: a run cannot go on from it"):
    run(config, tmp_path)


def test_a_key_that_came_later_counts_as_its_default(workdir, domain, one_cpu, capsys):  # noqa: F811
  file = workdir / "config.json"
  then = json.loads(file.read_text())
  del then["train"]["z_loss"], then["data"]["packing"], then["lora"]
  file.write_text(json.dumps(then))
  run(config_of(domain, **SHORT), workdir)
  assert "12 of 12 steps are done" in capsys.readouterr().out
  del then["data"]["mean_span_length"]
  file.write_text(json.dumps(then))
  with pytest.raises(ValueError, match=r"data.mean_span_length: 3.0 then, 4.0 now"):
    run(config_of(domain, **SHORT, **{"data.mean_span_length": 4.0}), workdir)


# Two runs in one folder.

HOLD = """
import sys, time
from pathlib import Path
from train import upkeep
with upkeep.lock(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_and_a_kill_frees_it(workdir, domain, one_cpu):  # noqa: F811
  command_line = [sys.executable, "-c", HOLD, str(workdir / "checkpoints")]
  process = subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"(?s)another run writes to .*{process.pid}"):
      run(config_of(domain, **SHORT), workdir)
    with pytest.raises(ValueError, match="another run writes to"):
      upkeep.prune(workdir / "checkpoints", 1)
    with Checkpoints(workdir) as reader:  # reading needs no lock
      assert reader.latest() == 12
  finally:
    process.kill()
    process.wait()
  with Checkpoints(workdir, writes=True) as writer:
    assert writer.latest() == 12


# The disk.


def test_a_full_disk_is_a_clear_error_and_the_last_step_stays(workdir, domain, one_cpu):  # noqa: F811
  """A file may have 4 KiB at most from step 13 on, by setrlimit; the arrays of a step have more."""
  config = config_of(domain, **{"train.steps": 12})
  before = {path: path.read_bytes() for path in (workdir / "checkpoints" / "12").rglob("*") if path.is_file()}
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    done = run(config, workdir)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  logging.disable(logging.CRITICAL)  # pytest keeps what is logged in a file, which would be full, too
  with Checkpoints(workdir) as reader:
    record = reader.restore_run(12)
  try:
    with (
      pytest.raises(NotSaved, match=r"was not saved in .*12.*Make room"),
      Checkpoints(workdir, 2, writes=True) as writer,
    ):
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
      writer.save(13, {"params": done.params, "opt": done.params}, record)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logging.disable(logging.NOTSET)
  assert {path: path.read_bytes() for path in before} == before
  assert not list((workdir / "checkpoints").glob("13*"))  # and what was begun is gone
  with Checkpoints(workdir) as reader:
    assert reader.latest() == 12


def small_disk(folder: Path, size: str) -> None:
  folder.mkdir()
  made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
  if made.returncode:
    pytest.skip("a small file system needs the right to mount one")


def tiny_run(domain, workdir) -> subprocess.CompletedProcess:  # noqa: F811
  """Runs `argot train` in a process of its own, as a user would."""
  script = (
    "import sys, jax\n"
    "from tests.test_train import config_of, loop, make_mesh, run\n"
    "from scripts import __main__ as command, train\n"
    "loop.make_mesh = lambda sizes: make_mesh(sizes, jax.devices()[:1])\n"
    "command.VERBS['train'] = lambda rest: run(config_of(rest[0], **{'train.steps': 12}), rest[1])\n"
    "command.main()\n"
  )
  return subprocess.run(
    [sys.executable, "-c", script, "train", str(domain), str(workdir)],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=240,
  )


@pytest.mark.slow
def test_a_small_file_system_that_fills_up(domain, tmp_path):  # noqa: F811
  disk = tmp_path / "disk"
  small_disk(disk, "1600k")
  try:
    ended = tiny_run(domain, disk / "run")
    said = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and said.startswith("argot train: ") and "No space left" in said, ended.stderr[-2000:]
    whole = [step for step in upkeep.look(disk / "run" / "checkpoints", whole=True) if not step.problem]
    assert whole and len(whole) == len(upkeep.steps(disk / "run" / "checkpoints"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    again = tiny_run(domain, disk / "run")
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr[-2000:]
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_folder_is_a_clear_error(domain, workdir, tmp_path, one_cpu):  # noqa: F811
  disk = tmp_path / "disk"
  small_disk(disk, "16m")
  try:
    shutil.copytree(workdir, disk / "run")
    upkeep.rollback(disk / "run" / "checkpoints", 8)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):  # which `argot` makes one line and exit code 1 of
      run(config_of(domain, **SHORT), disk / "run")
    with pytest.raises(OSError, match="Read-only file system"):
      Checkpoints(disk / "run", writes=True)
    with Checkpoints(disk / "run") as reader:  # reading works
      assert reader.latest() == 8
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_errors_of_the_system_end_with_one_line(monkeypatch):
  def full(rest):
    raise NotSaved("checkpoint 8 was not saved")

  monkeypatch.setitem(command.VERBS, "train", full)
  monkeypatch.setattr(sys, "argv", ["argot", "train"])
  with pytest.raises(SystemExit, match="^argot train: checkpoint 8 was not saved$"):
    command.main()


def test_an_error_while_the_disk_is_written_ends_the_run(domain, tmp_path, one_cpu, monkeypatch):  # noqa: F811
  write = manifest.write

  def fails(folder, step, *rest):
    if step == 8:
      raise OSError(errno.EIO, "the disk is gone")
    write(folder, step, *rest)

  monkeypatch.setattr(manifest, "write", fails)
  with pytest.raises(NotSaved, match=r"the disk is gone.*steps \[4\]"):
    run(config_of(domain, **SHORT), tmp_path)
  monkeypatch.setattr(manifest, "write", write)
  assert run(config_of(domain, **SHORT), tmp_path).record["steps"] == 12


# The verb.


def argot(*arguments: str) -> int:
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, "argv", ["argot", "checkpoints", *arguments])
      command.main()
  except SystemExit as ended:
    print(ended.code)
    return 1
  return 0


def test_steps_are_listed_and_verified(workdir, capsys):
  assert argot(str(workdir)) == 0
  out = capsys.readouterr().out
  assert "2 checkpoints" in out and "step       12" in out and "sizes are right" in out and "MB" in out
  assert argot(str(workdir), "--verify") == 0 and "verified" in capsys.readouterr().out
  flip(largest(workdir / "checkpoints" / "12"))
  assert argot(str(workdir), "--verify") == 1
  assert "holds other bytes" in capsys.readouterr().out
  assert argot(str(workdir / "nowhere")) == 1 and "no checkpoints in" in capsys.readouterr().out


def test_pruning_keeps_whole_steps(workdir, capsys):
  folder = workdir / "checkpoints"
  flip(largest(folder / "12"))
  assert argot(str(workdir), "--prune=0") == 1
  assert argot(str(workdir), "--prune=1") == 0 and upkeep.steps(folder) == [8]
  assert f"deleted {folder / '12'}" in capsys.readouterr().out
  flip(largest(folder / "8"))
  assert argot(str(workdir), "--prune=1") == 1 and upkeep.steps(folder) == [8]


def test_pruning_deletes_nothing_that_may_be_whole(workdir, monkeypatch):
  folder = workdir / "checkpoints"
  monkeypatch.setattr(manifest, "_sum", lambda file: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
  with pytest.raises(OSError, match="Stale"):
    upkeep.prune(folder, 1)
  assert manifest.problem(folder / "12").startswith("it cannot be read")
  monkeypatch.undo()
  about = json.loads((folder / "12" / manifest.NAME).read_text())
  (folder / "12" / manifest.NAME).write_text(json.dumps({**about, "format": manifest.FORMAT + 1}))
  with pytest.raises(manifest.NewerFormat):
    upkeep.prune(folder, 1)
  assert upkeep.steps(folder) == [8, 12]


def test_a_list_reads_no_file_whole(workdir, monkeypatch, capsys):
  monkeypatch.setattr(manifest, "_sum", lambda file: pytest.fail(f"{file} was read"))
  assert argot(str(workdir)) == 0 and "sizes are right" in capsys.readouterr().out


def test_after_a_rollback_saving_works_and_the_end_is_the_same(workdir, finished, domain, one_cpu, capsys):  # noqa: F811
  (workdir / "evaluation.json").write_text("{}")
  assert argot(str(workdir), "--rollback=5") == 1 and "it has [8, 12]" in capsys.readouterr().out
  assert argot(str(workdir), "--rollback=8") == 0
  assert upkeep.steps(workdir / "checkpoints") == [8] and not (workdir / "evaluation.json").exists()
  again = run(config_of(domain, **SHORT), workdir)
  assert "going on from step 8" in capsys.readouterr().out
  assert all((a == b).all() for a, b in zip(params_of(again), finished[1], strict=True))
  assert [record["step"] for record in read_metrics(workdir)] == list(range(1, 13))
  assert upkeep.steps(workdir / "checkpoints") == [8, 12]


def test_one_stage_is_rolled_back_not_all(tmp_path, workdir):
  for name in ("base", "continued"):
    shutil.copytree(workdir, tmp_path / "recipe" / "stages" / name)
  assert argot(str(tmp_path / "recipe")) == 0
  assert argot(str(tmp_path / "recipe"), "--rollback=8") == 1
  assert argot(str(tmp_path / "recipe"), "--prune=1") == 0
  assert verb.age_of(59) == "59 s"


TWO = """
import sys
from pathlib import Path
import jax
count, rank, port, folders = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", count, rank)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from train.checkpoint import Checkpoints
layout = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
values = jax.make_array_from_callback((8, 4), layout, lambda index: whole[index])
try:
  for step in (1, 2):
    with Checkpoints(folders.split(",")[rank], writes=True) as writer:
      writer.save(step, {"params": {"x": values}}, {"steps": step})
  if rank == 0:
    files = [file for file in Path(folders.split(",")[0], "checkpoints", "2").rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
  with Checkpoints(folders.split(",")[rank], writes=True) as writer:
    print("newest", writer.latest(), writer.restore_run(1))
except ValueError as error:
  print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_agree_on_what_is_whole_and_must_share_the_folder(tmp_path, shared):
  from tests.test_processes import start

  folders = [str(tmp_path / "one"), str(tmp_path / ("one" if shared else "two"))]
  expected = "newest 1 {'steps': 1}" if shared else "give all of them one --workdir on a disk that they share"
  ended = start(TWO, 2, ",".join(folders))
  assert all(code == 0 and expected in out for code, out, _ in ended), [(out, err[-1500:]) for _, out, err in ended]
