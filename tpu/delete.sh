#!/usr/bin/env bash
# Gives the slice back, whatever state it is in. What is in the bucket stays.
#
#   tpu/delete.sh
source "$(dirname "$0")/common.sh"
gcloud compute tpus queued-resources delete "$TPU_NAME" "${FLAGS[@]}" --force --quiet
