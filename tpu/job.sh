#!/usr/bin/env bash
# Runs on a TPU host: starts, watches and stops one command of this project, without a terminal.
#   bash tpu/job.sh start MODULE [FLAGS] | restart MODULE [FLAGS] | state [MODULE [FLAGS]]
#   bash tpu/job.sh logs [TAIL FLAGS] | stop
#
# job/ holds the command, its log and process group, and the exit code once it has ended. Whoever
# runs the job holds job/lock, so a host that was restarted knows that its job is gone.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p job

runs() {
  ! flock --nonblock job/lock true
}

start() { # MODULE [FLAGS]
  exec 9>job/lock
  flock --nonblock 9 || {
    echo "error: $(hostname): a job runs already" >&2
    exit 1
  }
  rm -f job/code
  printf '%q ' "$@" >job/command
  # A session of its own outlives the terminal. It inherits the lock.
  setsid bash tpu/job.sh hold "$@" </dev/null >>job/log 2>&1 &
  echo $! >job/group
}

hold() { # MODULE [FLAGS]
  local code=0
  trap : TERM # which is for the command; this shell stays to write its exit code
  .venv/bin/python -m "moe_jax.$1" "${@:2}" --multiprocess_tpu || code=$?
  echo "$code" >job/code.new
  mv job/code.new job/code
}

# One word: none, running, done, stopped, failed (and the exit code), refused (bad flags or input:
# the same command would end in the same way), lost (the host was restarted), or busy (with
# another command than the one given).
state() { # [MODULE [FLAGS]]
  local command other=
  command=$(cat job/command 2>/dev/null) || true
  [[ $# -eq 0 || $command == "$(printf '%q ' "$@")" ]] || other=1
  if runs; then
    [[ -n $other ]] && echo busy || echo running
  elif [[ -n $other || -z $command ]]; then
    echo none
  elif [[ ! -e job/code ]]; then
    echo lost
  else
    case $(cat job/code) in
      0) echo "done" ;;
      stopped) echo stopped ;;
      2) echo refused ;; # by a command without gin, which takes no --multiprocess_tpu
      1) tail -n 1 job/log | grep -q '^error: ' && echo refused || echo failed 1 ;;
      *) echo "failed $(cat job/code)" ;;
    esac
  fi
}

end() {
  runs || return 0
  # The command saves first, if it can.
  kill -TERM -- "-$(cat job/group)"
  flock --timeout "${GRACE:-120}" job/lock true || {
    kill -KILL -- "-$(cat job/group)"
    flock job/lock true
  }
}

restart() { # MODULE [FLAGS]
  end
  start "$@"
}

stop() {
  end
  [[ $(cat job/code 2>/dev/null) == 0 ]] || echo stopped >job/code
}

case $1 in
  state) echo "$(hostname) $(state "${@:2}")" ;;
  logs)
    shift
    touch job/log
    tail "${@:--n20}" job/log | sed --unbuffered "s/^/$(hostname): /"
    ;;
  start | restart | stop | hold) "$@" ;;
esac
