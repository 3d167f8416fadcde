#!/usr/bin/env bash
# Makes a Cloud TPU and runs one command of this project on all its hosts. See README.md in this
# directory.
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: tpu/launch.sh COMMAND [ARGUMENTS]

  keep MODULE [FLAGS]    does everything: makes the TPU, sets it up, runs `python -m moe_jax.MODULE
                         FLAGS`, and makes and starts anew what is preempted or ends, until it is done
  create [GCLOUD FLAGS]  asks for the TPU, a queued resource, and waits until it is there
  setup                  copies the last commit to every host, installs it, mounts BUCKET
  run MODULE [FLAGS]     starts `python -m moe_jax.MODULE FLAGS` on every host, as one job
  status                 tells the state of the TPU, and of the job on every host
  logs [TAIL FLAGS]      prints the end of every host's log (-f follows it, -n 100 prints more)
  stop                   asks the job to save and stop, on every host
  delete                 deletes the TPU

MODULE is a command with gin flags, such as train, eval or finetune.

environment:
  TPU_NAME, ZONE         needed
  PROJECT                gcloud's default project, if not set
  TYPE                   generation and size: v5e-8 (the default), v5p-8, v6e-16, v4-8, ...
  RUNTIME                image of the hosts, if not the generation's usual one
  SPOT=1                 asks for a cheaper TPU that can be preempted
  BUCKET                 is mounted at ~/bucket on every host
  RETRIES                how often in a row `keep` tries again what failed (3)
  POLL                   seconds between two looks at the TPU (60)
USAGE
  exit 2
}

fail() {
  echo "error: $*" >&2
  exit 1
}

# ---------------------------------------------------------------- the TPU, a queued resource

tpus() { # GROUP ACTION [ARGUMENTS]
  gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

request() { # [GCLOUD FLAGS]
  local type=${TYPE:-v5e-8} runtime
  case $type in
    v5e-* | v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) runtime=${RUNTIME:?"TYPE=$type is none of v5e-N, v5p-N, v6e-N, v4-N, v3-N, v2-N: set RUNTIME too"} ;;
  esac
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="${type/#v5e-/v5litepod-}" --runtime-version="${RUNTIME:-$runtime}" \
    ${SPOT:+--spot} "$@"
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if there is none, UNKNOWN if gcloud fails.
tpu_state() {
  local answer
  if answer=$(tpus queued-resources describe "$TPU_NAME" --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

delete() {
  tpus queued-resources delete "$TPU_NAME" --force
}

wait_for_tpu() {
  local state before=
  while state=$(tpu_state) && [[ $state != ACTIVE ]]; do
    [[ $state == "$before" ]] || echo "$TPU_NAME: $state"
    before=$state
    case $state in
      FAILED | SUSPENDED | NONE) fail "there will be no TPU: delete it, and create it again" ;;
    esac
    sleep "$poll"
  done
  echo "$TPU_NAME: ACTIVE"
}

# ---------------------------------------------------------------- its hosts

everywhere() { # COMMAND
  tpus tpu-vm ssh "$TPU_NAME" --worker=all --command="$1" --ssh-flag=-oConnectTimeout=30 \
    --ssh-flag=-oServerAliveInterval=30
}

job() { # ACTION [ARGUMENTS]
  everywhere "bash moe_jax/tpu/job.sh $(printf '%q ' "$@")"
}

setup() (
  [[ -z $(git -C "$root" status --porcelain) ]] ||
    echo "note: changes that are not committed stay here" >&2
  directory=$(mktemp -d)
  trap 'rm -rf "$directory"' EXIT
  git -C "$root" archive --format=tar.gz --output="$directory/moe_jax.tar.gz" HEAD &&
    tpus tpu-vm scp "$directory/moe_jax.tar.gz" "$TPU_NAME:moe_jax.tar.gz" --worker=all &&
    everywhere "mkdir -p moe_jax && tar xzf moe_jax.tar.gz -C moe_jax && bash moe_jax/tpu/setup.sh ${BUCKET:-}"
)

# ---------------------------------------------------------------- a job until it is done

# Looks at the TPU and at the job, does the next thing that is missing, and looks again. So it does
# not matter when it is interrupted and started again.
keep() { # MODULE [FLAGS]
  local failures=0 started=$SECONDS seen='' before='' state
  # Without a project or a permission, looking again does not help. Later, a failure passes.
  [[ $(tpu_state) != UNKNOWN ]] || fail "gcloud does not answer about $TPU_NAME"
  while :; do
    state=$(tpu_state)
    [[ $state != ACTIVE ]] || state=$(hosts "$@")
    [[ $state == "$before" ]] || echo "$(date +%T) $TPU_NAME: ${state//$'\n'/, }"
    before=$state
    # How the job ended before this command was given does not matter.
    [[ -n $seen ]] || state=$(sed -E 's/ (failed|refused|lost|stopped).*/ none/' <<<"$state")
    case $state in
      NONE) attempt request ;;
      FAILED) # the request, such as for want of quota
        failed
        attempt delete
        ;;
      SUSPENDED | PREEMPTED | TERMINATED) attempt delete ;;
      *" busy"*) fail "another job runs there; tpu/launch.sh stop ends it" ;;
      *" refused"*)
        job logs -n 1 || true
        fail "the same command would end like this again"
        ;;
      *" stopped"*) fail "the job was stopped" ;;
      *" failed"* | *" lost"*)
        job logs -n 5 || true
        failed
        attempt begin "$@"
        ;;
      *" none"*) attempt begin "$@" ;;
      *" running"*)
        seen=1
        # An hour of work makes up for earlier failures.
        ((SECONDS - started < 3600)) || failures=0
        ;;
      *" done"*) return ;;
    esac
    sleep "$poll"
  done
}

# A line per host: its name and the state of the job there. One word if they do not answer: that of
# the TPU VM if it is gone, otherwise `unreachable`, for the reason on standard error.
hosts() { # MODULE [FLAGS]
  local lines errors
  errors=$(mktemp)
  # Where nothing is set up yet, there is no job.sh to ask.
  lines=$(everywhere "test -e moe_jax/tpu/job.sh || exec echo \$(hostname) none
    bash moe_jax/tpu/job.sh state $(printf '%q ' "$@")" 2>"$errors") || lines=
  if [[ -n $lines ]]; then
    sort <<<"$lines"
  else
    lines=$(tpus tpu-vm describe "$TPU_NAME" --format='value(state)' 2>/dev/null) || true
    case $lines in
      PREEMPTED | TERMINATED) echo "$lines" ;;
      *)
        tail -n 1 "$errors" >&2
        echo unreachable
        ;;
    esac
  fi
  rm "$errors"
}

begin() { # MODULE [FLAGS]
  setup && job restart "$@" && started=$SECONDS && seen=1
}

attempt() { # COMMAND [ARGUMENTS]
  "$@" || failed
}

failed() {
  failures=$((failures + 1))
  ((failures <= ${RETRIES:-3})) || fail "gives up after $failures failures in a row"
}

[[ $# -gt 0 && -n "${TPU_NAME:-}" && -n "${ZONE:-}" ]] || usage
action=$1
shift
poll=${POLL:-60}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $action in
  keep)
    [[ $# -gt 0 ]] || usage
    keep "$@"
    ;;
  create) request "$@" && wait_for_tpu ;;
  setup) setup ;;
  run)
    [[ $# -gt 0 ]] || usage
    job start "$@"
    ;;
  status)
    state=$(tpu_state)
    echo "$TPU_NAME: $state"
    [[ $state != ACTIVE ]] || job state
    ;;
  logs) job logs "$@" ;;
  stop) job stop ;;
  delete) delete ;;
  *) usage ;;
esac
