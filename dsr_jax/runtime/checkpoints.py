"""Checkpoints of a run: written beside the training, complete or absent, and read back onto any
mesh.

A checkpoint at step s holds the trainable parameters, the optimizer's state and the step, and a
description of the
run: the configuration that must match, the source model's name and hash. Random keys and the place
in the data are functions of (seed, step), so they are not in it; frozen parameters come from the
source model. A directory `checkpoints/<step>` appears by a rename once all of it is on disk, so a
kill leaves none behind that is half-written.
"""

import dataclasses
import hashlib
import os
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dsr_jax import saved_config, sharding
from dsr_jax.errors import InputError

SPARE_BYTES = 64 << 20  # left to the rest of the run: metrics, pictures, the page
# Names in a checkpoint -> attributes of `TrainState`. All else comes from the source model.
SAVED = {'params': 'params', 'opt_state': 'opt_state', 'step': 'step', 'ema': 'ema_params'}


class Checkpoints:
  """The checkpoints of one workdir, or of the bucket that stands for it.

  `about` describes the run, in JSON values: {'method': its settings, 'data': {..., 'fingerprint'},
  'model': {..., 'fingerprint'}}.
  """

  def __init__(self, workdir, about, keep_last=2, keep_every=0, read_only=False):
    self._directory = _directory(workdir)
    self._about = about
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_last,
      keep_period=keep_every or None,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    )
    if read_only:  # beside a run that may be at work there
      options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, item_names=('state', 'about')
    )

  def latest(self):
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def steps(self):
    """All complete steps, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step, state):
    """Starts writing `state`; returns once the arrays are the writer's own, so that the caller may
    donate them.

    Errors: InputError if the disk has no room, before anything is written.
    """
    if self.latest() == step:
      return
    kept = saved_part(state)
    self.check_room(state)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_owned(kept)), about=ocp.args.JsonSave(self._about)
      ),
    )

  def restore(self, state, step=None):
    """Returns `state` with its saved parts from checkpoint `step` (the newest), placed as `state`'s
    own arrays are.

    Errors: InputError if the run that wrote it was configured differently (the differences are
    named), or if it cannot be read.
    """
    step = self.latest() if step is None else step
    check_same_run(self.about(step), self._about, self._directory)
    kept = saved_part(state)
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), kept
    )
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
      )['state']
    except (ValueError, OSError, KeyError) as e:
      raise InputError(
        f'cannot read the checkpoint {self._directory}/{step} ({_first_line(e)}); expected one '
        'written by this run; remove that folder to go on from the one before it'
      ) from e
    # Orbax' buffers may be views of file memory; the step donates its state, so it gets buffers of
    # the runtime.
    restored = jax.tree.map(jnp.copy, restored)
    return dataclasses.replace(state, **{SAVED[name]: part for name, part in restored.items()})

  def about(self, step):
    """What the run that wrote checkpoint `step` said of itself."""
    return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
      'about'
    ]

  def check_room(self, state):
    """InputError if the disk has no room for one more checkpoint of `state`. Buckets (`gs://`) have
    no such limit.
    """
    if '://' in self._directory:
      return
    free = shutil.disk_usage(self._directory).free
    need = num_bytes(saved_part(state)) + SPARE_BYTES
    if free < need:
      raise InputError(
        f'found {_mib(free)} MiB free at {self._directory}; expected {_mib(need)} MiB for a '
        'checkpoint; '
        'free some, lower system.keep_last, or choose another --workdir'
      )

  def wait(self):
    """Waits until what was started is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits, and ends the writer's threads."""
    self._manager.close()


def load_trained(workdir, step=None):
  """A run's trained parameters, without the run: (parameters, about, step) from
  `workdir/checkpoints`.

  parameters: nested dict of NumPy arrays, as `TrainState.params` has them. Errors:
    InputError where there is no
  such checkpoint.
  """
  directory = _directory(workdir)
  if not epath.Path(directory).is_dir():
    raise InputError(f'found no {directory}; expected the workdir of a run; name another')
  # metadata is read before anything else names the handlers
  handlers = {'state': ocp.PyTreeCheckpointHandler(), 'about': ocp.JsonCheckpointHandler()}
  options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
  with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
    steps = sorted(manager.all_steps())
    chosen = steps[-1] if step is None and steps else step
    if chosen not in steps:
      raise InputError(
        f'found checkpoints {steps} in {directory}; expected one of step '
        f'{"any" if step is None else step}; name one of them'
      )
    # The optimizer's moments, twice as large, stay on disk.
    params = dict(manager.item_metadata(chosen)['state'].tree)['params']
    target = {'params': jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), params)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    found = manager.restore(
      chosen,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True),
        about=ocp.args.JsonRestore(),
      ),
    )
  return found['state']['params'], found['about'], chosen


def check_same_run(saved, now, directory):
  """InputError naming every difference in method, data or source model between a checkpoint's run
  and this run.

  Data and model are the same if their fingerprints are, wherever they lie by now.
  """
  different = saved_config.differences(
    saved_config.completed(saved)['method'], saved_config.completed(now)['method'], 'method.'
  )
  for part in ('data', 'model'):
    if saved[part]['fingerprint'] != now[part]['fingerprint']:
      different += saved_config.differences(saved[part], now[part], f'{part}.')
  if different:
    raise InputError(
      f'found checkpoints of another run in {directory} (checkpoint -> now: '
      f'{"; ".join(different)}); '
      'expected the same method, data and model; use the same settings, or another --workdir'
    )


def num_bytes(tree):
  """Bytes of all arrays of a pytree, whole (not by device)."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fingerprint(tree):
  """SHA-256 of every array with its path: equal exactly when all parameters are equal bit by
  bit.
  """
  digest = hashlib.sha256()
  for path, leaf in sorted(
    jax.tree_util.tree_leaves_with_path(tree), key=lambda item: jax.tree_util.keystr(item[0])
  ):
    leaf = sharding.fetch(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}'.encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def _directory(workdir):
  return os.path.join(workdir if '://' in workdir else os.path.abspath(workdir), 'checkpoints')


def saved_part(state):
  """What a checkpoint holds of a `TrainState`: a dict of its parts that are saved and not None."""
  parts = {name: getattr(state, attribute) for name, attribute in SAVED.items()}
  return {name: part for name, part in parts.items() if part is not None}


def _owned(tree):
  # On CPU the writer would read the very buffers that the next step's donation overwrites.
  return jax.tree.map(jnp.copy, tree) if jax.default_backend() == 'cpu' else tree


def _mib(n):
  return f'{n / 2**20:,.0f}'


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
