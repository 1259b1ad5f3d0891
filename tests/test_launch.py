"""What the launchers would do, from their --dry-run; the scripts' own syntax; how the command itself starts."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from data.tokenizer import byte_tokenizer
from scripts import flags
from train.loop import build_model
from train.programs import check_rows

LAUNCH = Path(__file__).resolve().parent.parent / "scripts" / "launch"


def said(*command: str) -> tuple[int, list[str], str]:
  """Runs a launcher where no gcloud, srun or kubectl is; returns its code, lines and errors."""
  environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
  done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=LAUNCH.parent.parent, timeout=60)
  return done.returncode, done.stdout.splitlines(), done.stderr


def words(line: str) -> list[str]:
  """Returns the words that bash makes of a command line."""
  return subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout.split("\0")[
    :-1
  ]


def tpu(*arguments: str) -> tuple[int, list[str], str]:
  return said("bash", str(LAUNCH / "tpu_vm.sh"), *arguments)


def gke(*arguments: str) -> tuple[int, list[str], str]:
  return said(sys.executable, "-m", "scripts.launch.gke", *arguments)


def test_tpu_vm_keep_creates_installs_starts_and_follows():
  flags = ["--zone=us-west4-a", "--slices=2", "--spot", "--nfs=10.0.0.2:/share"]
  code, lines, _ = tpu("--dry-run", "keep", "mine", *flags, "--", "train", "--config=a.py:gpt", "--workdir=/mnt/a b")
  commands = [words(line) for line in lines]
  assert code == 0 and all(c[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for c in commands), lines
  assert [c[4] for c in commands] == ["create", "describe", "scp", "ssh", "ssh", "ssh"]
  assert {"--node-count=2", "--node-prefix=mine", "--spot", "--zone=us-west4-a"} <= set(commands[0])
  install, start, follow = (c[-1].removeprefix("--command=") for c in commands[3:])
  assert "mount -t nfs '10.0.0.2:/share' /mnt/argot" in install
  inner = words(start.split(" -c ")[1].split(" > ~/argot.log")[0])[0]  # what the worker's shell makes of it
  inner = words(inner.split("bin/argot ")[1].split(";")[0])
  assert inner == ["train", "--config=a.py:gpt", "--workdir=/mnt/a b"]
  assert all("--node=all" in c and "--worker=all" in c for c in commands[2:5])
  assert "--node=0" in commands[5] and "--worker=0" in commands[5] and "argot.exit" in follow


def test_tpu_vm_one_slice_down_and_mistakes():
  _, (line, *_), _ = tpu("--dry-run", "up", "one", "--zone=z", "--project=p", "--type=v6e-8")
  assert {"--node-id=one", "--accelerator-type=v6e-8", "--project=p"} <= set(shlex.split(line)) and "spot" not in line
  _, (line,), _ = tpu("--dry-run", "down", "one", "--zone=z")
  assert line.split()[3:6] == ["queued-resources", "delete", "one"] and "--force" in line
  for arguments, message in (
    (("up", "one"), "--zone"),
    (("fly", "one", "--zone=z"), "unknown verb"),
    (("run", "one", "--zone=z", "--dry-run"), "what to run"),
    (("up", "one", "--zone=z", "--chips=4"), "unknown flag --chips=4"),
  ):
    code, _, error = tpu(*arguments)
    assert code == 2 and message in error


GCLOUD = r"""#!/usr/bin/env bash
echo "$4 ${@: -1}" | head -n 1 >> "$FAKE/calls"
case "$4 $*" in
  describe*)
    if [ -e "$FAKE/offline" ]; then rm "$FAKE/offline"; echo "connection reset" >&2; exit 1; fi
    [ -e "$FAKE/there" ] || { echo "NOT_FOUND: Resource 'mine' was not found" >&2; exit 1; }
    cat "$FAKE/there" ;;
  create*) echo ACTIVE > "$FAKE/there" ;;
  delete*) rm "$FAKE/there" ;;
  *echo\ over*) # which worker 0 says only of the second run on
    if [ -e "$FAKE/running" ]; then echo runs; exit; fi
    if [ "$(grep -c tail "$FAKE/calls")" -gt 1 ]; then echo over $FAKE_END; fi ;;
  *tail*) # the first run is preempted, the second one ends well or badly
    if [ ! -e "$FAKE/once" ]; then touch "$FAKE/once"; echo SUSPENDED > "$FAKE/there"; exit 255; fi
    if [ "$FAKE_END" = 75 ] && [ "$(grep -c tail "$FAKE/calls")" -gt 3 ]; then exit 0; fi
    exit "${FAKE_END:-1}" ;;
esac
"""


def pretend(folder: Path, monkeypatch, end: str, gcloud: str = GCLOUD) -> None:
  """Puts a `gcloud` and a `sleep` before the real ones; runs end with the code `end`."""
  for name, text in (("gcloud", gcloud), ("sleep", "#!/bin/sh\n")):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  for key, value in {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "FAKE_END": end}.items():
    monkeypatch.setenv(key, value)


@pytest.mark.parametrize(("end", "message"), [("0", ""), ("3", "has ended with an error")])
def test_tpu_vm_keep_makes_a_preempted_slice_again_but_not_a_failed_run(tmp_path, monkeypatch, end, message):
  pretend(tmp_path, monkeypatch, end)
  code, _, error = tpu("keep", "mine", "--zone=z", "--spot", "--", "train")
  calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
  made = [call for call in calls if call in ("create", "delete")]
  assert made == ["create", "delete", "create"] and calls.count("scp") == 2, calls
  assert (code == 0) == (end == "0") and message in error


@pytest.mark.parametrize(
  ("end", "code", "starts", "message"),
  [("75", 0, 3, "started again"), ("", 2, 4, "with an error 4 times"), ("1", 2, 4, "with an error 4 times")],
)
def test_tpu_vm_keep_starts_again_what_goes_on_and_gives_up_in_the_end(
  tmp_path, monkeypatch, end, code, starts, message
):
  pretend(tmp_path, monkeypatch, end)
  (tmp_path / "once").touch()
  found, _, error = tpu("keep", "mine", "--zone=z", "--", "train")
  calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
  assert found == code and message in error and "delete" not in calls
  assert calls.count("scp") == starts and calls.count("create") == 1, calls


def test_tpu_vm_keep_gives_up_where_the_slice_cannot_be_made(tmp_path, monkeypatch):
  pretend(tmp_path, monkeypatch, "0", GCLOUD.replace("echo ACTIVE >", "echo FAILED >"))
  code, _, error = tpu("keep", "mine", "--zone=z", "--", "train")
  calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
  assert code == 2 and "could not be made" in error and calls.count("create") == 1 and "delete" not in calls


@pytest.mark.parametrize("trouble", ["offline", "running"])
def test_tpu_vm_keep_touches_neither_what_it_cannot_see_nor_what_runs(tmp_path, monkeypatch, trouble):
  pretend(tmp_path, monkeypatch, "0")
  for file in ("once", trouble):
    (tmp_path / file).touch()
  (tmp_path / "there").write_text("ACTIVE\n")
  code, _, error = tpu("keep", "mine", "--zone=z", "--", "train")
  calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
  assert code == 0 and not {"create", "delete"} & set(calls), error
  assert calls.count("scp") == (trouble == "offline"), calls


def test_tpu_vm_stop_lets_the_run_write_its_code(tmp_path):
  _, lines, _ = tpu("--dry-run", "run", "one", "--zone=z", "--", "train")
  start = words(next(line for line in lines if "argot.pid" in line))[-1].removeprefix("--command=")
  app = tmp_path / "argot" / ".venv" / "bin" / "argot"
  app.parent.mkdir(parents=True)
  app.write_text("#!/usr/bin/env bash\ntrap 'exit 75' TERM\ntouch ~/up\nwhile true; do sleep 0.1; done\n")
  app.chmod(0o755)
  home = {**os.environ, "HOME": str(tmp_path)}
  stop = "until [ -e ~/up ]; do sleep 0.1; done; kill -TERM -- -$(cat ~/argot.pid)"
  wait = "for i in $(seq 100); do [ -s ~/argot.exit ] && break; sleep 0.1; done; cat ~/argot.exit"
  done = subprocess.run(
    ["bash", "-c", f"{start}; {stop}; {wait}"], capture_output=True, text=True, env=home, timeout=60
  )
  assert done.stdout.strip() == "75", done.stderr


def test_slurm_starts_a_process_a_gpu_and_lays_data_over_nodes():
  script = str(LAUNCH / "slurm.sbatch")
  code, lines, _ = said("bash", script, "--dry-run", "train", "--config=a", "--workdir=w")
  assert code == 0 and {"sbatch --requeue", "sbatch --ntasks-per-node=8", "sbatch --gpus-per-node=8"} <= set(lines)
  run = "srun --kill-on-bad-exit=1 python -m scripts"
  assert lines[-1].strip() == f"{run} train --config=a --workdir=w --config.mesh.slices=2"
  _, lines, _ = said("bash", script, "--dry-run", "train", "--config=a", "--config.mesh.slices=1")
  assert lines[-1].strip() == f"{run} train --config=a --config.mesh.slices=1"
  _, lines, _ = said("bash", script, "--dry-run", "evaluate", "--model=m")
  assert lines[-1].strip() == f"{run} evaluate --model=m"
  assert said("bash", script)[0] == 2


@pytest.mark.parametrize(("end", "again"), [("75", True), ("0", False)])
def test_slurm_tells_the_run_that_time_is_over_and_queues_it_again_unless_it_is_done(tmp_path, end, again):
  fakes = {
    "srun": f"echo $$ > $FAKE/step; trap 'echo saved; exit {end}' TERM; touch $FAKE/up; while :; do sleep 0.05; done",
    "scancel": 'echo "scancel $*"; kill -TERM "$(cat "$FAKE/step")"',
    "scontrol": 'echo "scontrol $*"',
  }
  for name, text in fakes.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "7"}
  job = f"bash {LAUNCH / 'slurm.sbatch'} evaluate & until [ -e $FAKE/up ]; do sleep 0.05; done; kill -USR1 $!; wait $!"
  done = subprocess.run(["bash", "-c", job], capture_output=True, text=True, env={**os.environ, **places}, timeout=60)
  lines = done.stdout.splitlines()
  assert lines[:2] == ["scancel --signal=TERM 7.0", "saved"] and done.returncode == int(end), done
  assert ("scontrol requeue 7" in lines) == again


NEEDED = ["--name=mine", "--accelerator=tpu-v5-lite-podslice", "--image=i:1", "--claim=shared", "--dry-run"]


def test_gke_fills_the_jobset_in():
  yaml = pytest.importorskip("yaml")
  odd = ['--config.x={"a": "$b"}', "--config.y=$(HOME) $$ (a|b)$", "--workdir=/a b/😀: #"]
  flags = ["--topology=4x8", "--slices=3", "--spot", "--folder=/a: b #c"]
  code, lines, _ = gke(*NEEDED, *flags, "--", "train", *odd)
  found = yaml.safe_load("\n".join(lines))
  (job,) = found["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  assert code == 0 and found["kind"] == "JobSet" and job["replicas"] == 3
  assert spec["parallelism"] == spec["completions"] == 8
  # The kubelet makes one $ of two, and a variable of $(NAME).
  assert all("$(" not in word.replace("$$", "") for word in container["command"])
  assert [word.replace("$$", "$") for word in container["command"]] == ["python", "-m", "scripts", "train", *odd]
  assert container["volumeMounts"][0]["mountPath"] == "/a: b #c" and container["env"][0]["value"] == "/a: b #c/cache"
  assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "i:1"
  selector = spec["template"]["spec"]["nodeSelector"]
  assert selector["cloud.google.com/gke-tpu-topology"] == "4x8" and selector["cloud.google.com/gke-spot"] == "true"
  assert json.dumps(spec["template"]["spec"]["volumes"]).count('"shared"') == 2
  (rule,) = spec["podFailurePolicy"]["rules"]  # codes of train/exits.py after which the same command would end so again
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3, 65, 130]
  assert found["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [(["--topology=4"], "sides"), (["--topology=2x3"], "no multiple of 4"), (["--topology=4x4", "--name=A_b"], "--name")]
  + [(["--topology=0x4"], "sides"), (["--topology=4x4", "--chips-per-host=0"], "expected 1 or more")]
  + [(["--topology=4x4", "--slices=0"], "expected 1"), (["--topology=4x4", "--restarts=-1"], "expected 0 or more")],
)
def test_gke_mistakes(arguments, message):
  code, _, error = gke(*NEEDED, *arguments, "--", "train")
  assert code == 1 and message in error


def chips(command: list[str]) -> int:
  """Returns the devices that a launcher's flags ask for."""
  given = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--") and "=" in word)
  if "type" in given:
    return int(given["type"].split("-")[-1]) * int(given["slices"])
  if "topology" in given:
    return math.prod(map(int, given["topology"].split("x"))) * int(given["slices"])
  in_a_node = re.search("--gpus-per-node=([0-9]+)", (LAUNCH / "slurm.sbatch").read_text())[1]
  return int(given["nodes"]) * int(in_a_node)


@pytest.mark.parametrize(
  ("file", "count"), [("README.md", 3), ("scripts/launch/gke.py", 1), ("scripts/launch/tpu_vm.sh", 1)]
)
def test_the_commands_that_are_shown_can_run(file, count, monkeypatch):
  monkeypatch.chdir(LAUNCH.parent.parent)
  monkeypatch.setattr(sys, "argv", sys.argv)  # which parsing sets
  text = Path(file).read_text().replace("\\\\\n", "\\\n")  # as a docstring has it
  joined = re.sub(r"\\\n[# ]*", " ", text)
  commands = re.findall(r"^#? *((?:\S*tpu_vm.sh keep|sbatch --nodes=4|python -m scripts.launch.gke) .*)$", joined, re.M)
  assert len(commands) == count
  for command in map(shlex.split, commands):
    verb = next(i for i, word in enumerate(command) if word in ("train", "recipe"))
    values = flags.new()
    flags.config(values)
    flags.string(values, "workdir", None, "")
    config = flags.parse(values, command[verb], "", command[verb + 1 :], ["config", "workdir"]).config
    build_model(config, byte_tokenizer())
    mesh = AbstractMesh((chips(command), 1, 1, 1), ("data", "fsdp", "context", "tensor"))
    check_rows(config, mesh)


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_scripts_are_clean(name):
  assert said("bash", "-n", str(LAUNCH / name))[0] == 0
  if checker := shutil.which("shellcheck"):
    code, lines, _ = said(checker, "-s", "bash", str(LAUNCH / name))
    assert code == 0, lines


@pytest.mark.parametrize(
  "given, found",
  [
    ("", "glibc.malloc.hugetlb=1"),
    ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),  # the user's word stands
  ],
)
def test_the_command_starts_once_more_with_large_pages(given, found):
  code = "import os, sys; from scripts import __main__ as argot, start; print('up'); sys.stdout.flush(); "
  code += (
    "argot.main = lambda: print(os.environ.get('GLIBC_TUNABLES', ''), sys.argv[1:], sys.flags.optimize); start.main()"
  )
  environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
  environment |= {"GLIBC_TUNABLES": given} if given else {}
  command = [sys.executable, "-O", "-c", code, "one", "two words"]
  done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=LAUNCH.parent.parent, timeout=60)
  assert done.returncode == 0, done.stderr
  starts, found = (1, given) if "hugetlb" in given or sys.platform != "linux" else (2, found)
  assert done.stdout.splitlines() == ["up"] * starts + [f"{found} ['one', 'two words'] 1"]
