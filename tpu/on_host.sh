#!/usr/bin/env bash
# What the other scripts run on each host of a slice, in ~/dsr_jax: install, start ARGUMENTS, follow, stop.
set -euo pipefail
cd "$(dirname "$0")/.."
METADATA=${TPU_METADATA:-http://metadata.google.internal/computeMetadata/v1/instance/attributes}

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' "$METADATA/$1"
}

at_work() {
  [[ -f run.pid ]] && kill -0 "$(cat run.pid)" 2>/dev/null
}

install() {
  # The images bring Python 3.10; uv brings a newer one without root.
  local python
  python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || true)
  if [[ -z $python ]]; then
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv python install 3.12
    python=$(~/.local/bin/uv python find 3.12)
  fi
  [[ -x .venv/bin/pip ]] || "$python" -m venv --clear .venv
  .venv/bin/pip install --quiet -r requirements-tpu.txt
  .venv/bin/python -c 'import jax; print(jax.__version__)'
}

start() {
  if at_work; then
    echo "at work      process $(cat run.pid)"
    return
  fi
  # The hosts of a slice by address, the first of which coordinates, and which one this is.
  local hosts count cluster=()
  hosts=$(metadata worker-network-endpoints | tr ',' '\n' | cut -d: -f3)
  count=$(wc -l <<< "$hosts")
  if [[ $count -gt 1 ]]; then
    cluster=("--coordinator=$(head -n 1 <<< "$hosts"):8476" "--processes=$count" "--process=$(metadata agent-worker-number)")
  fi
  rm -f run.code
  nohup tpu/on_host.sh work "${cluster[@]}" "--config.system.compile_cache=$HOME/compiled" "$@" > run.log 2>&1 < /dev/null &
  echo $! > run.pid
}

work() {
  local code=0
  .venv/bin/python -m dsr_jax.main "$@" || code=$?
  echo "$code" > run.code
}

follow() {
  [[ -f run.pid ]] || { echo 'error: there is no run here; start one with tpu/run.sh' >&2; exit 1; }
  tail -n +1 -f --pid="$(cat run.pid)" run.log
  # 1: killed, with the host or alone.
  exit "$(cat run.code 2>/dev/null || echo 1)"
}

stop() {
  if at_work; then
    pkill -TERM -P "$(cat run.pid)" || true
    tail -f --pid="$(cat run.pid)" /dev/null
  fi
}

case ${1:-} in
  install | follow | stop) "$1" ;;
  start | work) "$1" "${@:2}" ;;
  *) echo "error: unknown action ${1:-(none)}: use install, start, follow or stop" >&2; exit 2 ;;
esac
