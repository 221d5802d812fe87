#!/usr/bin/env bash
# Starts a run on all hosts of the slice, or finds it at work, and shows the first host's log until it ends; exits as the run does.
#
#   tpu/run.sh --config=configs/janus_pro_7b.py --workdir=runs/7b --config.system.bucket=gs://my-bucket/7b [--config.key=value]
#
# The arguments are those of dsr_jax.main. The bucket gets the checkpoints and copies of metrics, pictures and pages. Ctrl-C here leaves
# the run alone; tpu/stop.sh stops it after a step, with a checkpoint.
source "$(dirname "$0")/common.sh"
[[ $# -gt 0 ]] || fail 'no arguments; give those of dsr_jax.main: --config=FILE --workdir=DIR'
[[ "$*" == *--config.system.bucket=gs://* ]] ||
  fail '--config.system.bucket=gs://... is missing: the hosts of a slice share no disk, so the run needs a bucket; name one'

on_hosts all "dsr_jax/tpu/on_host.sh start $(printf '%q ' "$@")"
on_hosts 0 'dsr_jax/tpu/on_host.sh follow'
