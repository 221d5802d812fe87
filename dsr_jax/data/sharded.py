"""A run's batches on the mesh: each process makes the rows for its own devices."""

from collections.abc import Mapping

from dsr_jax import sharding
from dsr_jax.data import batches
from dsr_jax.data.held_out import Apart


class ShardedBatches:
  """`at(step)` is a `rollouts.Batch` of arrays on the mesh.

  fingerprint: identifies the data. facts: stored with it in a checkpoint: the numbers of prompts
  and images, and the held-out ones. prompts, pictures: see `batches.Batches`.

  kept: the held-out inputs of a resumed run; None for a new run.
  """

  def __init__(self, config, model, mesh, kept: Mapping | None = None):
    m, own = config.method, config.eval.benchmark == 'own'
    probes = config.system.probe_every and 'generation' in m.tasks
    self._batches = batches.make(
      config.data,
      m,
      model.processor,
      model.spec.image_size,
      fields=('swapped_prompts',) if probes else (),
      apart=Apart(
        share=config.eval.held_out if own else 0.0,
        listed=config.eval.watched if own else 0,
        kept=kept,
      ),
    )
    self.prompts, self.pictures = self._batches.prompts, self._batches.pictures
    self._mesh = mesh
    self._rows = m.inputs_per_task
    self.fingerprint = self._batches.fingerprint
    self.facts = {'number': self._batches.sizes()}
    if self._batches.held_out:
      self.facts['held_out'] = self._batches.held_out
    if self._batches.earlier_fingerprint:
      self.facts['earlier_fingerprint'] = self._batches.earlier_fingerprint
    # Files may go bad during the run; generated images do not.
    self.can_fail = 'understanding' in m.tasks and config.data.images != 'scenes'

  def at(self, step: int):
    """The batch of step `step` (from 0)."""
    first, last = sharding.rows_here(self._mesh, self._rows)
    return sharding.place_batch(self._batches.at(step, first, last), self._mesh, first, self._rows)

  def texts_at(self, step: int) -> list[str]:
    """The step's prompts as strings."""
    return self._batches.texts_at(step)
