#!/usr/bin/env bash
# Runs on a TPU host: installs this checkout and mounts BUCKET, if given.
#   bash tpu/setup.sh [BUCKET]
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v python3.13 || command -v python3.12 || command -v python3.11) || {
  echo "error: Python 3.11 to 3.13 is needed" >&2
  exit 1
}
"$python" -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'

if [[ -n "${1:-}" ]] && ! mountpoint -q ~/bucket; then
  mkdir -p ~/bucket
  gcsfuse --implicit-dirs "$1" ~/bucket
fi
.venv/bin/python -c 'import jax; print(jax.local_device_count(), "local devices")'
