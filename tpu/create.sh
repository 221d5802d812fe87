#!/usr/bin/env bash
# Asks for a slice and waits until it is there.
#
#   export TPU_NAME=my-slice TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-64      (v5e:8x8; v6e-64 is v6e:8x8, v5p-128 is v5p:4x4x4)
#   tpu/create.sh [--spot]
#
# TPU_PROJECT: the project, else gcloud's own. TPU_VERSION: the image, else the one for the type. TPU_POLL: seconds between two looks.
source "$(dirname "$0")/common.sh"
need TPU_TYPE v5litepod-64

case $TPU_TYPE in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  v4-*) version=tpu-ubuntu2204-base ;;
  *) fail "TPU_TYPE=$TPU_TYPE is not a known slice; set it to v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac

[[ $# -eq 0 || ($# -eq 1 && $1 == --spot) ]] || fail "unexpected arguments $*: give --spot or nothing"

gcloud compute tpus queued-resources create "$TPU_NAME" "${FLAGS[@]}" "--node-id=$TPU_NAME" "--accelerator-type=$TPU_TYPE" \
  "--runtime-version=${TPU_VERSION:-$version}" "$@"

while true; do
  now=$(state)
  case $now in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED | ABSENT) fail "the slice $TPU_NAME is $now and will not start; run tpu/delete.sh and try again" ;;
  esac
  echo "waiting      for $TPU_NAME: $now" >&2
  sleep "${TPU_POLL:-30}"
done
echo "ready        $TPU_NAME" >&2
