"""Prefetching: a thread makes the next batch while the devices compute on the current one."""

import concurrent.futures
import time

import jax

from dsr_jax.errors import InputError

_GLANCE_SECONDS = 0.002  # between two checks whether the devices are still computing


class Ahead:
  """Makes the next batch during the step.

  batches: has `at(step)`. Usage: `begin(step)`, start the step, then `finish(metrics)`.
  """

  def __init__(self, batches):
    self._batches = batches
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batch')
    self._future: concurrent.futures.Future | None = None
    self.error: InputError | None = None
    self.waited = 0.0  # seconds that the devices were idle, waiting for the last batch

  def begin(self, step: int):
    """Starts making the batch of step `step` (from 0)."""
    self._future = self._thread.submit(self._batches.at, step)

  def finish(self, at_work):
    """The batch that `begin` started; None if there is none, or if it failed with an InputError,
    which is then in `error`.

    at_work: arrays that the devices are computing; the waiting time counts from when they are done.
    """
    self.waited, future, self._future = 0.0, self._future, None
    if future is None:
      return None
    idle_since = None
    while not future.done():
      if idle_since is None and _are_done(at_work):
        idle_since = time.perf_counter()
      concurrent.futures.wait([future], _GLANCE_SECONDS)
    if idle_since is not None:
      self.waited = time.perf_counter() - idle_since
    try:
      return future.result()
    except InputError as e:
      self.error = e
      return None

  def close(self):
    """Ends the thread after its current batch."""
    self._thread.shutdown(cancel_futures=True)


def _are_done(arrays) -> bool:
  return all(x.is_ready() for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array))
