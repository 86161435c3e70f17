#!/usr/bin/env bash
# Runs on every TPU VM; tpu.sh sends this file through ssh.
#   start ID COMMAND...   stop what an earlier start left running, run COMMAND, print its log, exit with its status
#   stop                  SIGTERM to the running COMMAND, which saves a checkpoint; SIGKILL after 120 seconds
# COMMAND survives a broken connection: it writes to a log file, which `start` follows. gcloud then repeats `start` with
# the same ID, which only follows again. A lock that COMMAND inherits tells whether it is still running.
# Nothing is exported, so that JAX and llmjax detect the TPU as they would without this script.
set -euo pipefail
folder=$HOME/.llmjax-job
mkdir -p "$folder"
exec 9>>"$folder/lock"

say() { echo "[$(hostname)] $*"; }

stop() {
  flock --nonblock 9 && return
  local job
  job=$(<"$folder/pid")
  say "stopping the running job: it saves a checkpoint"
  kill -TERM -- "-$job" 2>/dev/null || true
  if ! flock --timeout 120 9; then
    say "it did not stop within 120 seconds: killing it"
    kill -KILL -- "-$job" 2>/dev/null || true
    flock --timeout 30 9
  fi
}

# Starts COMMAND in a process group of its own, whose shell outlives it and writes down its exit status.
launch() {
  rm -f "$folder/status"
  [[ ! -e $folder/log ]] || mv "$folder/log" "$folder/previous.log"
  touch "$folder/log" # the follower may be faster than the job
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid bash -c 'trap : TERM; "${@:2}"; echo "$?" >"$1"' job "$folder/status" "$@" </dev/null >>"$folder/log" 2>&1 &
  echo "$!" >"$folder/pid"
}

start() {
  local id=$1 lines=20 status=137
  shift
  if [[ ! -e $folder/id || $(<"$folder/id") != "$id" ]]; then
    stop
    launch "$@"
    echo "$id" >"$folder/id"
    lines=+1
  fi
  # Not the lock: a follower that outlives its connection must not look like a running job.
  tail --lines="$lines" --follow --pid="$(<"$folder/pid")" --sleep-interval=0.2 "$folder/log" 9>&- |
    sed --unbuffered "s/^/[$(hostname)] /" 9>&-
  [[ ! -e $folder/status ]] || status=$(<"$folder/status")
  say "exit status $status"
  exit "$status"
}

"$@"
