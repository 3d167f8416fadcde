#!/usr/bin/env bash
# Runs one command of this project on every host of a Cloud TPU. See README.md in this directory.
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: tpu/launch.sh create|setup|run|delete [ARGUMENTS]

  create                 makes the TPU
  setup                  copies this checkout to every host, installs it, mounts BUCKET
  run MODULE [FLAGS]     runs `python -m moe_jax.MODULE FLAGS` on every host, as one job
  delete                 deletes the TPU

environment: TPU_NAME, ZONE (both needed), PROJECT, TYPE (v5litepod-8), RUNTIME (v2-alpha-tpuv5-lite),
BUCKET (mounted at ~/bucket on every host), DRY_RUN=1 (prints the commands only)
USAGE
  exit 2
}

[[ $# -gt 0 && -n "${TPU_NAME:-}" && -n "${ZONE:-}" ]] || usage
action=$1
shift
where=("$TPU_NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

call() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

everywhere() {
  call gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command="$1"
}

case $action in
  create)
    call gcloud compute tpus tpu-vm create "${where[@]}" \
      --accelerator-type="${TYPE:-v5litepod-8}" --version="${RUNTIME:-v2-alpha-tpuv5-lite}"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:moe_jax.tar.gz" "${where[@]:1}" \
      --worker=all
    everywhere "mkdir -p moe_jax && tar xzf moe_jax.tar.gz -C moe_jax && bash moe_jax/tpu/setup.sh ${BUCKET:-}"
    ;;
  run)
    [[ $# -gt 0 ]] || usage
    everywhere "cd moe_jax && .venv/bin/python -m moe_jax.$(printf '%q ' "$@")--multiprocess_tpu"
    ;;
  delete)
    call gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
    ;;
  *)
    usage
    ;;
esac
