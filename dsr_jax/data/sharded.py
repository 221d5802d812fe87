"""A run's batches on the mesh: each process makes the rows that its devices hold."""

from dsr_jax import sharding
from dsr_jax.data import batches


class ShardedBatches:
  """`at(step)` is a `rollouts.Batch` of arrays on the mesh.

  fingerprint tells data apart; facts is what is said where it differs: how many prompts and
  pictures there are.
  """

  def __init__(self, config, model, mesh):
    m = config.method
    probes = config.system.probe_every and 'generation' in m.tasks
    self._batches = batches.make(
      config.data,
      m,
      model.processor,
      model.spec.image_size,
      fields=('swapped_prompts',) if probes else (),
    )
    self._mesh = mesh
    self._rows = m.inputs_per_task
    self.fingerprint = self._batches.fingerprint
    self.facts = {'number': self._batches.sizes()}
    if self._batches.earlier_fingerprint:
      self.facts['earlier_fingerprint'] = self._batches.earlier_fingerprint
    # Files may go bad while the run is at work; drawn pictures do not.
    self.can_fail = 'understanding' in m.tasks and config.data.images != 'scenes'

  def at(self, step: int):
    """The batch of step `step` (from 0)."""
    first, last = sharding.rows_here(self._mesh, self._rows)
    return sharding.place_batch(self._batches.at(step, first, last), self._mesh, first, self._rows)
