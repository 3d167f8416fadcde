#!/usr/bin/env bash
# Runs on a TPU host: installs this checkout, with a Python that it needs, and mounts BUCKET.
#   bash tpu/setup.sh [BUCKET]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$HOME/.local/bin:$PATH

# The hosts' images have Python 3.10, and no module venv. uv brings what is missing.
command -v uv >/dev/null ||
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
uv venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'

if [[ -n "${1:-}" ]] && ! mountpoint -q ~/bucket; then
  command -v gcsfuse >/dev/null || {
    key=/usr/share/keyrings/cloud.google.asc
    packages=https://packages.cloud.google.com/apt
    curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # The image updates itself after its start, and holds apt's lock meanwhile.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install gcsfuse
  }
  mkdir -p ~/bucket
  gcsfuse --implicit-dirs "$1" ~/bucket
fi
echo "$(hostname): installed, $(.venv/bin/python --version)"
