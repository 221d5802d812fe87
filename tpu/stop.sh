#!/usr/bin/env bash
# Stops the run on all hosts after the step it is at; it saves, and tpu/run.sh goes on from there.
#
#   tpu/stop.sh
source "$(dirname "$0")/common.sh"
on_hosts all 'dsr_jax/tpu/on_host.sh stop'
