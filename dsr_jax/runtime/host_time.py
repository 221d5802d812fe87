"""Seconds of the host's time that go into looking at a run, by part: what a step waits for."""

import contextlib
import time


class HostTime:
  """Adds up: `with spent.on('rows'): ...`. Waiting for the devices inside counts too."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def on(self, part: str):
    """Counts what happens inside as `part`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
