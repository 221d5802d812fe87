# What the scripts share: settings from the environment, and the two ways of speaking to a slice. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# need NAME EXAMPLE: the setting NAME must be there.
need() {
  [[ -n ${!1:-} ]] || fail "$1 is not set in the environment; export it, for example as $2"
}

need TPU_NAME my-slice
need TPU_ZONE us-west4-a
command -v gcloud >/dev/null || fail 'gcloud is not installed; install the Google Cloud CLI: https://cloud.google.com/sdk'

FLAGS=("--zone=$TPU_ZONE")
if [[ -n ${TPU_PROJECT:-} ]]; then
  FLAGS+=("--project=$TPU_PROJECT")
fi

# state: of the queued resource, as ACTIVE; ABSENT where there is none.
state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${FLAGS[@]}" '--format=value(state.state)' 2>/dev/null || echo ABSENT
}

# on_hosts WHICH COMMAND: runs a command on one host (0, 1, ...) or on all.
on_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${FLAGS[@]}" "--worker=$1" "--command=$2"
}
