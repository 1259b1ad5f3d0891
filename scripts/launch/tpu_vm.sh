#!/usr/bin/env bash
# Runs Argot on Google Cloud TPU VMs: one slice, or several (multislice), by queued resources.
#
#   tpu_vm.sh [--dry-run] VERB NAME --zone=ZONE [--project=PROJECT] [FLAGS] [-- argot's verb and flags]
#
#   up      create the queued resource, wait until it is active, install this checkout on every worker
#   run     start `argot …` (what follows --) on every worker, and follow worker 0
#   keep    up and run; after a preemption create, install and start again, until the run has ended; what it ended by
#           tells whether the same command can go on (train/exits.py), and of other errors the fourth ends it
#   logs    follow worker 0            stop    end the run on every worker
#   down    delete the queued resource and its TPUs
#
#   --type=v5litepod-16         accelerator type of a slice
#   --runtime=v2-alpha-tpuv5-lite
#   --slices=1                  --spot
#   --nfs=HOST:/SHARE           mounted as /mnt/argot on every worker; --workdir must lie there if there are several
#
# Example:
#   tpu_vm.sh keep mine --zone=us-west4-a --type=v5litepod-16 --slices=2 --spot --nfs=10.0.0.2:/share -- \
#     recipe --config=configs/domain.py:gpt-gpt2 --config.data.batch_size=256 --config.domain=/mnt/argot/my_domain \
#     --workdir=/mnt/argot/runs/mine
set -euo pipefail

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

dry="" verb="" name="" zone="" project="" type=v5litepod-16 runtime=v2-alpha-tpuv5-lite slices=1 spot="" nfs=""
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=yes ;;
    --nfs=*) nfs=${1#*=} ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) fail "unknown flag $1; see --help" ;;
    *) if [ -z "$verb" ]; then verb=$1; elif [ -z "$name" ]; then name=$1; else fail "what is $1? See --help"; fi ;;
  esac
  shift
done
[ -n "$verb" ] && [ -n "$name" ] && [ -n "$zone" ] || fail "expected VERB NAME --zone=ZONE; see --help"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: expected a whole number"

tpus=(gcloud compute tpus queued-resources)
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
argot=$(printf '%q ' "$@")

call() { # runs a command, or prints it
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

state() { # of the queued resource: NONE where there is none, UNKNOWN where gcloud cannot tell (no network, no login)
  local said errors
  errors=$(mktemp -t argot-XXXXXX)
  if said=$("${tpus[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors"); then
    echo "$said"
  elif grep -qi 'not.\?found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

on_all() { call "${tpus[@]}" ssh "$name" "${where[@]}" --node=all --worker=all --command="$1"; }

on_first() { call "${tpus[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 --command="$1"; }

create() {
  local nodes=("--node-id=$name")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  [ -z "$spot" ] || nodes+=(--spot)
  call "${tpus[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" "${nodes[@]}"
}

wait_until_active() {
  if [ -n "$dry" ]; then
    call "${tpus[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  local now
  until now=$(state) && [ "$now" = ACTIVE ]; do
    case $now in FAILED | SUSPENDING | SUSPENDED | NONE) echo "$name is $now" >&2; return 1 ;; esac
    echo "$name: $now"
    sleep 30
  done
}

install() {
  local code root
  root=$(dirname "$0")/../..
  code=$(mktemp -t argot-XXXXXX.tar.gz)
  [ -z "$(git -C "$root" status --porcelain)" ] || echo "tpu_vm.sh: changes that are not committed stay here" >&2
  git -C "$root" archive --format=tar.gz -o "$code" HEAD
  call "${tpus[@]}" scp "$code" "$name:argot.tar.gz" "${where[@]}" --node=all --worker=all
  rm -f "$code"
  local mount=""
  [ -z "$nfs" ] || mount="sudo apt-get install -qy nfs-common && sudo mkdir -p /mnt/argot &&
    (mountpoint -q /mnt/argot || sudo mount -t nfs '$nfs' /mnt/argot) && sudo chmod 777 /mnt/argot &&"
  on_all "set -e; $mount mkdir -p argot && tar -xzf argot.tar.gz -C argot && python3 -m pip install -q --user uv &&
    ~/.local/bin/uv venv -q --clear --python 3.12 argot/.venv &&
    ~/.local/bin/uv pip install -q --python argot/.venv/bin/python -e './argot[tpu]'"
}

start() {
  [ -n "${argot// /}" ] && [ "$argot" != "'' " ] || fail "$verb: what to run stands after --, such as -- train --config=…"
  # `stop` ends the whole group: this shell stays, to write the exit code.
  local run="trap : TERM; cd ~/argot && .venv/bin/argot $argot; echo \$? > ~/argot.exit"
  on_all "rm -f ~/argot.exit ~/argot.stop; nohup setsid bash -c $(printf '%q' "$run") > ~/argot.log 2>&1 < /dev/null & echo \$! > ~/argot.pid"
}

follow() { on_first "tail -n +1 -F --pid=\$(cat ~/argot.pid) ~/argot.log; code=\$(cat ~/argot.exit); exit \"\${code:-1}\""; }

status() { # of the run: "runs", "stopped" (by the verb), "over CODE" (no code: its shell is gone), nothing: not to be seen
  on_first "if kill -0 \$(cat ~/argot.pid); then echo runs; elif [ -e ~/argot.stop ]; then echo stopped
    else echo over \$(cat ~/argot.exit); fi" 2>/dev/null || true
}

stop() { on_all "touch ~/argot.stop; kill -TERM -- -\$(cat ~/argot.pid)"; }

down() { call "${tpus[@]}" delete "$name" "${where[@]}" --force --quiet; }

keep() {
  local found started lost failures=0
  while true; do
    found=NONE started="" lost=""
    [ -n "$dry" ] || found=$(state)
    if [ "$found" = UNKNOWN ]; then sleep 60; continue; fi
    if [ "$found" = NONE ]; then create; fi
    if [ "$found" = ACTIVE ] && [ "$(status)" = runs ]; then
      echo "$name: the run that is there goes on" >&2
      started=yes
    elif wait_until_active && install && start; then
      started=yes
    fi
    if [ -n "$started" ]; then
      until follow; do
        sleep 60 # a preemption shows late
        case $(state) in
          ACTIVE) case $(status) in
            "" | runs) ;; # asked again
            stopped) fail "the run was stopped" ;;
            "over 75") lost=run; break ;; # stopped and saved, as before a worker is serviced: the same command goes on
            "over 2" | "over 3" | "over 65" | "over 130") fail "the run has ended with an error; its log is above" ;;
            *)
              failures=$((failures + 1))
              [ "$failures" -lt 4 ] || fail "the run has ended with an error $failures times; its log is above"
              lost=run; break ;;
          esac ;;
          UNKNOWN) ;; # asked again: only what is surely gone is made again
          *) lost=slice; break ;;
        esac
      done
      if [ -z "$lost" ]; then
        [ -n "$dry" ] || echo "the run has ended; its TPUs are there until: tpu_vm.sh down $name ${where[*]}" >&2
        return 0
      fi
    fi
    if [ "$lost" = run ]; then
      echo "$name: the run is started again" >&2
      continue
    fi
    case $(state) in
      ACTIVE) fail "$name is active, but installing or starting failed" ;;
      FAILED) fail "$name could not be made; gcloud compute tpus queued-resources describe says why, \`down\` deletes it" ;;
      UNKNOWN) sleep 60; continue ;;
    esac
    echo "$name was preempted: it is made again" >&2
    down
  done
}

case $verb in
  up) create && wait_until_active && install ;;
  run) start && follow ;;
  keep) keep ;;
  logs) follow ;;
  stop) stop ;;
  down) down ;;
  *) fail "unknown verb $verb; known: up run keep logs stop down" ;;
esac
