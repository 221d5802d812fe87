"""Host seconds spent on monitoring a run, by part, during which steps wait."""

import contextlib
import time


class HostTime:
  """Sums times: `with spent.on('rows'): ...`. Waiting for the devices inside counts too."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def on(self, part: str):
    """Adds the time spent inside to `part`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
