#!/usr/bin/env bash
# Keeps a run going until it has ended: makes the slice, installs, runs; and after a preemption or a failure of a host does it again.
# The run goes on from its last checkpoint in the bucket.
#
#   tpu/keep.sh --config=configs/janus_pro_7b.py --workdir=runs/7b --config.system.bucket=gs://my-bucket/7b
#
# TPU_SPOT=1 asks for a spot slice. TPU_TRIES: how often a run may fail on a whole slice before this gives up (3). The settings of
# tpu/create.sh hold here too.
here=$(dirname "$0")
source "$here/common.sh"
need TPU_TYPE v5litepod-64
spot=()
if [[ ${TPU_SPOT:-0} == 1 ]]; then
  spot=(--spot)
fi

failures=0
while true; do
  now=$(state)
  if [[ $now != ACTIVE ]]; then
    if [[ $now != ABSENT ]]; then
      "$here/delete.sh"
    fi
    "$here/create.sh" "${spot[@]}"
    "$here/install.sh"
  fi
  code=0
  "$here/run.sh" "$@" || code=$?
  if [[ $code == 0 ]]; then
    break
  fi
  # 2: bad input, which a new start would not mend.
  [[ $code != 2 ]] || fail "the run did not start because of the bad input named above; fix it"
  if [[ $(state) == ACTIVE ]]; then
    failures=$((failures + 1))
    [[ $failures -lt ${TPU_TRIES:-3} ]] || fail "the run failed $failures times on a whole slice, so it is not restarted again; see its log"
    on_hosts all 'dsr_jax/tpu/on_host.sh stop' || true
  fi
  echo "again        after exit status $code" >&2
  sleep "${TPU_POLL:-30}"
done
