"""Summarizes the log of JAX's coordination service in one sentence when it aborts a process.

If another process dies or never starts, the service aborts this one from C++ with a screenful of
logs and stack traces, while Python waits for devices and cannot print. This file therefore runs as
a separate process that filters the stderr of the one that may be aborted (`distributed.together`):
it passes on everything except the service's lines, and at the end prints what they mean. It needs
only Python, and starts in a few hundredths of a second.
"""

import re
import signal
import sys

# For example `F1129 05:00:20.313508     825 client.h:80] Terminating process because ...`.
_HEAD = re.compile(r'[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\]')
# Source files of the service, and of Orbax, which reports the same error or preemption.
_SERVICE = re.compile(
  r'coordination_service|preemption_|client\.h|add_port|multihost\.py|async_checkpointer\.py'
)
_ABORT = 'Terminating process because the JAX distributed service'
_AGAIN = re.compile(r'(\d+) unexpectedly tried to connect with a different incarnation')
_SILENT = re.compile(r'stopped sending heartbeats\):\s+((?:[\d,]+\s+)+)')


def sentence(text: str, processes: str, where: str, wait: str, silent: str) -> str | None:
  """The service's log -> the sentence to print; None if it did not abort the process.

  processes: their number; where: HOST:PORT of process 0; wait, silent: the limits in seconds.
  """
  if _ABORT not in text:
    return None
  again = 'start all of them again to resume from the last checkpoint'
  if 'ALREADY_EXISTS' in text:
    return 'two processes have the same number; give each its own --process: 0, 1, ...'
  if found := _AGAIN.search(text):
    return (
      f'another process {found[1]} connected to {where}, from another run or started again; fix '
      '--process or --coordinator of the other one, since each run needs its own port and each '
      f'process its own number, and {again}'
    )
  if 'RegisterTask' in text and 'DEADLINE_EXCEEDED' in text:
    return (
      f'not all of {processes} processes connected to {where} within {wait} s; start those that '
      'are missing, set --coordinator to the address of process 0, or raise --wait_seconds'
    )
  if 'RegisterTask' in text:
    return (
      f'process 0 at {where} refuses this process ({_reason(text)}); start {processes} processes '
      'with the same --processes, each with its own --process'
    )
  gone = '0'
  if found := _SILENT.search(text):
    gone = ', '.join(re.findall(r'\d+', found[1]))
  elif 'CoordinationService/Heartbeat' not in text and 'Failed to send RPC' not in text:
    return f'JAX ended the run of {processes} processes ({_reason(text)}); {again}'
  return (
    f'process {gone} of {processes} died or has been silent for {silent} s; all processes must '
    f'run to the end: {again}'
  )


def _reason(text):
  return text.rpartition('absl::Status: ')[2].partition('\n')[0][:200]


def main(processes, where, wait, silent):
  """Copies stdin to stderr line by line, except the service's lines."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # it ends after the process that it filters
  service, aborted, withheld = False, False, []
  for line in sys.stdin:
    if head := _HEAD.match(line):
      service = bool(_SERVICE.match(head[1]))
      aborted = aborted or _ABORT in line  # only stack traces follow
    if service or aborted:
      withheld.append(line)
    else:
      sys.stderr.write(line)
      sys.stderr.flush()
  if said := sentence(''.join(withheld), processes, where, wait, silent):
    sys.stderr.write(f'error: {said}\n')


if __name__ == '__main__':
  sys.stdin.reconfigure(errors='replace')  # type: ignore[union-attr]
  main(*sys.argv[1:])
