#!/usr/bin/env bash
# Brings this checkout to all hosts of the slice and installs what it needs, for Python 3.11 or newer.
#
#   tpu/install.sh
source "$(dirname "$0")/common.sh"

root=$(cd "$(dirname "$0")/.." && pwd)
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
tar -C "$root" --exclude=.git --exclude=.venv --exclude=runs --exclude=build --exclude=__pycache__ -czf "$packed/dsr_jax.tar.gz" . ||
  [[ $? == 1 ]] # a file changed while it was read, which does not matter

gcloud compute tpus tpu-vm scp "$packed/dsr_jax.tar.gz" "$TPU_NAME:dsr_jax.tar.gz" "${FLAGS[@]}" --worker=all
on_hosts all 'mkdir -p dsr_jax && tar -C dsr_jax -xzf dsr_jax.tar.gz && dsr_jax/tpu/on_host.sh install'
