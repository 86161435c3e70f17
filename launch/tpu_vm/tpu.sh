#!/usr/bin/env bash
# Runs a job on Cloud TPU VMs, by queued resources: create, run, babysit, stop, delete.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
poll_seconds=30 window_seconds=86400
python=$here/../../.venv/bin/python
[[ -x $python ]] || python=python3

usage() {
  cat <<'HELP'
Runs a job on every host of a TPU slice, or of several slices, by queued resources. Needs gcloud, signed in.

  launch/tpu_vm/tpu.sh create  --name=NAME --zone=ZONE --type=TYPE [--slices=N] [--spot] [--runtime=VERSION]
  launch/tpu_vm/tpu.sh run     --name=NAME --zone=ZONE -- COMMAND
  launch/tpu_vm/tpu.sh babysit (flags of create) [--setup=COMMAND] [--restarts=N] [--wait=HOURS] -- COMMAND
  launch/tpu_vm/tpu.sh stop    --name=NAME --zone=ZONE
  launch/tpu_vm/tpu.sh delete  --name=NAME --zone=ZONE

create    requests the TPU and returns; the request waits in a queue until there is capacity
run       runs COMMAND in the home folder of every host, prints its log and ends with its exit status
babysit   creates the TPU if it is absent, waits for it, runs the setup and then COMMAND, and restarts COMMAND by its
          exit status: 0 done; 76, 77, 78 stop; 85 at once; 75 and crashes after a growing pause. Ends after --restarts
          within a day, and when two restarts in a row wrote no newer checkpoint. A TPU that was preempted is deleted
          and requested again, and such a restart is not counted.
stop      sends SIGTERM to COMMAND on every host: llmjax saves a checkpoint and exits with 85
delete    deletes the TPU and its disks. It costs money until then, also while nothing runs

  --type=TYPE        accelerator type, such as v6e-16, v5p-128 or v5litepod-32
  --slices=N         slices of that type, joined by the data centre's network (default 1)
  --spot             spot capacity: cheaper, and preempted at any time
  --runtime=VERSION  image of the TPU VMs (default: by --type)
  --project=PROJECT  default: gcloud's
  --setup=COMMAND    shell command that prepares every host, run when a TPU is new to this babysit
  --restarts=N       restarts within a day (default 20)
  --wait=HOURS       longest wait for capacity (default 48)

Example, with spot capacity and a checkpoint folder that outlives the TPU:
  launch/tpu_vm/tpu.sh babysit --name=a --zone=us-east5-b --type=v6e-16 --spot \
      --setup='gcloud storage cp gs://BUCKET/llmjax/setup.sh . && bash setup.sh gs://BUCKET/llmjax' \
      -- venv/bin/llmjax train --config=llama:1B --workdir=gs://BUCKET/runs/a --config.data.store=store \
      --config.data.sources.main.path='/my/texts/**/*.txt'

Ctrl-C stops COMMAND as `stop` does; the TPU stays. COMMAND also survives a broken connection: the next run or babysit
stops it, which saves a checkpoint, and starts it again. docs/launch_cloud.md has the whole story.
HELP
}

fail() {
  echo "launch/tpu_vm/tpu.sh: error: $*; see launch/tpu_vm/tpu.sh --help" >&2
  exit 78
}

log() { echo "[tpu] $*"; }

parse() {
  name='' zone='' type='' slices=1 spot='' runtime='' project='' setup='' restarts=20 wait_hours=48 command=()
  while (($#)); do
    case $1 in
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --type=?*) type=${1#*=} ;;
      --slices=*) slices=$(positive "$1") ;;
      --spot) spot=--spot ;;
      --runtime=?*) runtime=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --setup=?*) setup=${1#*=} ;;
      --restarts=*) restarts=$(positive "$1") ;;
      --wait=*) wait_hours=$(positive "$1") ;;
      --)
        shift
        command=("$@")
        break
        ;;
      *) fail "$1: unknown flag or missing value" ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: expected a name of up to 40 lower-case letters, digits and hyphens"
  [[ -n $zone ]] || fail "--zone is missing; give the zone of the TPU, such as --zone=us-east5-b"
  case $verb in
    create | babysit) check_type ;;
  esac
  case $verb in
    run | babysit) ((${#command[@]})) || fail "the command is missing; put it after --, such as: -- llmjax train ..." ;;
  esac
}

positive() {
  [[ ${1#*=} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1: expected an integer above 0"
  echo "${1#*=}"
}

check_type() {
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || fail "--type=$type: expected an accelerator type, such as v6e-16"
  [[ -z $runtime ]] || return 0
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--type=$type: no default image is known; give --runtime=VERSION" ;;
  esac
}

# gcloud's command for queued resources: `queued VERB FLAGS...` adds the name, the zone and the project.
queued() {
  gcloud alpha compute tpus queued-resources "$1" "$name" --zone="$zone" ${project:+"--project=$project"} "${@:2}"
}

create() {
  local nodes=--node-id=$name
  ((slices == 1)) || nodes=--node-count=$slices # named NAME-0, NAME-1, ...
  queued create --accelerator-type="$type" --runtime-version="$runtime" "$nodes" ${spot:+"$spot"}
}

delete() { queued delete --force --quiet; }

# Runs a shell command line on all hosts at once. In batches, which are gcloud's default, a job of more than 64 hosts
# would wait for hosts that have not started. A connection to a host that is gone ends after two minutes.
on_all_hosts() {
  queued ssh --node=all --worker=all --batch-size=all --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oServerAliveCountMax=4 --command="$1" </dev/null
}

# The command line that runs worker.sh with these arguments, which may hold any character.
worker() {
  printf '%q ' bash -c "$(<"$here/worker.sh")" worker "$@"
}

stop() { on_all_hosts "$(worker stop)"; }

# Prints the lines of all hosts, and writes the newest checkpoint that they name and the exit statuses into the file $1.
follow() {
  local line statuses=() step=-1
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line"
    if [[ $line =~ ^\[[^]]*\]\ exit\ status\ ([0-9]+)$ ]]; then statuses+=("${BASH_REMATCH[1]}"); fi
    if [[ $line =~ ^\[[^]]*\]\ +(resuming at|stop requested:)\ step\ ([0-9]+)[,\ ] ]]; then step=${BASH_REMATCH[2]}; fi
  done
  printf '%s\n' "$step ${statuses[*]-}" >"$1"
}

starts=0 newest=-1
# Runs COMMAND on all hosts. Sets `statuses` to theirs, and `newest` to the newest checkpoint that is known.
# The job is a process group of its own, so that Ctrl-C reaches it only as the SIGTERM of `stop`.
start() {
  local summary job line step
  summary=$(mktemp)
  starts=$((starts + 1))
  line=$(worker start "$(date +%s)-$$-$starts" "${command[@]}")
  set -m
  {
    on_all_hosts "$line" 2>&1 || echo "[gcloud] exit status $?"
  } | follow "$summary" &
  job=$!
  set +m
  while kill -0 "$job" 2>/dev/null; do
    wait "$job" || true # a trapped signal interrupts it
  done
  read -r step statuses <"$summary" || true
  rm -f "$summary"
  ((step <= newest)) || newest=$step
  statuses=${statuses:-1} # no host has been reached
}

# Asks launch/restarts.py, with these flags. Sets `status` to that of the job, `seconds` to the pause before the next
# start ("-": none), and `reason`.
decide() {
  read -r status seconds reason < <("$python" "$here/../restarts.py" --state="$memory" --window="$window_seconds" \
    --newest="$newest" --statuses="$statuses" "$@") || fail "launch/restarts.py gave no decision"
}

run() {
  start
  decide --limit=0
}

stopped=''
on_signal() {
  [[ -z $stopped ]] || return 0
  stopped=yes
  log "stopping the job on all hosts; it saves a checkpoint"
  stop || log "the hosts could not be reached: the job may still be running"
}

# The state of the queued resource; ABSENT if there is none. PREEMPTED if one of its TPUs is gone, which the queued
# resource itself may not show.
state() {
  local text
  if ! text=$(queued describe --format='value(state.state)' 2>&1); then
    case $text in
      *NOT_FOUND*) echo ABSENT ;;
      *) echo "UNKNOWN (${text//$'\n'/ })" ;;
    esac
  elif [[ $text == ACTIVE && $(tpu_vms) =~ PREEMPTED|TERMINATED ]]; then
    echo PREEMPTED
  else
    echo "$text"
  fi
}

tpu_vms() {
  gcloud alpha compute tpus tpu-vm list --zone="$zone" ${project:+"--project=$project"} \
    --filter="name ~ '/$name(-[0-9]+)?\$'" --format='value(state)'
}

# Returns when the TPU is active; creates it where it is absent, and again where it was preempted.
await_tpu() {
  local now failures=0 deadline=$((SECONDS + wait_hours * 3600))
  while [[ -z $stopped ]]; do
    now=$(state)
    [[ $now == "$last" ]] || log "$name: $now"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      ABSENT) if create; then is_new=yes; else failures=$((failures + 1)); fi ;;
      FAILED) delete && failures=$((failures + 1)) ;;
      PREEMPTED | SUSPENDED) delete && continue ;;
    esac
    if ((failures >= 3 || SECONDS >= deadline)); then
      log "no TPU after $failures failures to create one; the longest wait is $wait_hours hours"
      status=75
      return 1
    fi
    pause "$poll_seconds"
  done
  return 1
}

# Sleeps, but not through a signal.
pause() { sleep "$1" & wait $! || true; }

babysit() {
  local lost
  is_new=yes status=143 last=''
  while await_tpu; do
    if [[ -n $is_new && -n $setup ]] && ! on_all_hosts "$setup"; then
      log "the setup failed"
      statuses=1
    else
      is_new=''
      start
    fi
    lost=''
    [[ $(state) == ACTIVE ]] || lost=--preempted
    decide --limit="$restarts" ${lost:+"$lost"}
    [[ -z $stopped ]] || return 0
    log "$reason"
    [[ $seconds != - ]] || return 0
    pause "$seconds"
  done
}

verb=${1-}
case $verb in
  -h | --help | help | '') usage && exit 0 ;;
  create | run | babysit | stop | delete) shift ;;
  *) fail "$verb: unknown command; choose create, run, babysit, stop or delete" ;;
esac
for argument in "$@"; do
  case $argument in
    --) break ;;
    -h | --help) usage && exit 0 ;;
  esac
done
parse "$@"
command -v gcloud >/dev/null || fail "gcloud is not on PATH; install the Google Cloud CLI"
status=0
case $verb in
  run | babysit)
    memory=$(mktemp)
    trap 'rm -f "$memory"' EXIT
    trap on_signal INT TERM HUP
    "$verb"
    exit "$status"
    ;;
  *) "$verb" ;;
esac
