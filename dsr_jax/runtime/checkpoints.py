"""Checkpoints of a run: written asynchronously and atomically, and restored onto any mesh.

A checkpoint at step s has the trainable parameters, the optimizer state, the step, and a
description of the run: the configuration that must match, and the source model's name and hash. It
has no PRNG keys and no data position, which are functions of (seed, step), and no frozen
parameters, which come from the source model. A directory `checkpoints/<step>` appears by a rename
when all of it is on disk, so a kill never leaves a partial one.

The last files written before that rename are the checksums of all files. Readers compare them
first, so damage gives a one-sentence error that suggests the previous checkpoint.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dsr_jax import cli, saved_config, sharding
from dsr_jax.errors import InputError, first_line
from dsr_jax.runtime import checksums

SPARE_BYTES = 64 << 20  # reserved for the rest of the run: metrics, images, the page
# Names in a checkpoint -> attributes of `TrainState`. The rest comes from the source model.
SAVED = {'params': 'params', 'opt_state': 'opt_state', 'step': 'step', 'ema': 'ema_params'}
# File that marks a checkpoint in a bucket as complete; buckets have no rename.
COMMITTED = b'complete\n'
# Entry in Orbax's metadata: this checkpoint has checksums, so if they are missing, it is damaged.
CHECKED = {'checksums': checksums.CHECKSUMS}
# Read errors whose reason is outside the checkpoint.
NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)


class Checkpoints:
  """The checkpoints of a workdir, or of the bucket that replaces it.

  about: describes the run in JSON values: {'method': its settings, 'data': {..., 'fingerprint'},
  'model': {..., 'fingerprint'}}.
  """

  def __init__(self, workdir, about, keep_last=2, keep_every=0):
    self._directory = _directory(workdir)
    self._about = about
    in_bucket = self._directory.startswith('gs://')
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_last,
      keep_period=keep_every or None,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
      temporary_path_class=_CheckedInBucket if in_bucket else _Checked,
      lightweight_initialize=True,  # check existing checkpoints only when they are read
    )
    logging.getLogger('absl').addFilter(_is_no_repeat)
    with _writing(self._directory):
      self._manager = ocp.CheckpointManager(
        self._directory, options=options, item_names=('state', 'about')
      )

  def latest(self):
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step, state):
    """Starts writing `state`. Returns when the writer has copied the arrays, so that the caller may
    donate them.

    InputError if the disk has no room (before writing anything), or if writing the previous
    checkpoint failed.
    """
    if self.latest() == step:
      return
    kept = saved_part(state)
    self.check_room(state)
    with _writing(self._directory):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_owned(kept)), about=ocp.args.JsonSave(self._about)
        ),
        custom_metadata=CHECKED,
      )

  def verify(self, step, accept_changed_data=False):
    """InputError unless checkpoint `step` is intact and belongs to this run; it names the
    differences. accept_changed_data: ignore changed prompts and images.
    """
    with _reading(self._directory, step):
      _check_whole(self._directory, step)
      saved = _about(self._directory, step)
      if accept_changed_data and _data_differ(saved['data'], self._about['data']):
        changes = '; '.join(_data_differences(saved['data'], self._about['data']))
        cli.log(f'note         resuming with changed data: {changes}')
        saved['data'] = self._about['data']
      check_same_run(saved, self._about, self._directory)

  def restore(self, state, step=None, verified=False):
    """Returns `state` with the saved parts from checkpoint `step` (None: the newest), with the
    shardings of `state`. Calls `verify` first, with its errors, unless `verified`.
    """
    step = self.latest() if step is None else step
    if not verified:
      self.verify(step)
    return read_state(self._directory, step, state)

  def check_room(self, state):
    """InputError if the disk has no room for another checkpoint of `state`. Buckets (`gs://`) have
    no limit.
    """
    if '://' in self._directory:
      return
    with _writing(self._directory):
      free = shutil.disk_usage(self._directory).free
    need = num_bytes(saved_part(state)) + SPARE_BYTES
    if free < need:
      raise InputError(
        f'{self._directory} has {_mib(free)} MiB free, but a checkpoint needs {_mib(need)} MiB; '
        'free some, lower system.keep_last, or choose another --workdir'
      )

  def wait(self):
    """Waits until the pending checkpoint is on disk. InputError if writing it failed."""
    with _writing(self._directory):
      self._manager.wait_until_finished()

  def close(self):
    """Calls `wait`, and ends the writer's threads."""
    with _writing(self._directory):
      self._manager.close()


# Reading.


def steps_in(workdir) -> list[int]:
  """The complete checkpoints of a workdir or bucket, in order; none if there is no such folder.

  An emptied checkpoint counts: reading it reports the damage.
  """
  return _steps(_directory(workdir))


def restore(workdir, step, state, about):
  """`Checkpoints.restore` for readers, while a run may be writing there."""
  directory = _directory(workdir)
  with _reading(directory, step):
    _check_whole(directory, step)
    check_same_run(_about(directory, step), about, directory)
  return read_state(directory, step, state)


def read_state(directory, step, state):
  """`state` with the saved parts from a verified checkpoint."""
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved_part(state)
  )
  with _reading(directory, step):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      restored = reader.restore(
        epath.Path(directory) / str(step) / 'state', args=ocp.args.StandardRestore(target)
      )
    # Orbax's buffers may be views of file memory. The step donates its state, so copy them to
    # buffers of the runtime.
    restored = jax.tree.map(jnp.copy, restored)
    held = int(sharding.fetch(restored['step']))
    if held != step:
      raise ValueError(f'it holds step {held}')
  return dataclasses.replace(state, **{SAVED[name]: part for name, part in restored.items()})


def newest_method(workdir) -> dict | None:
  """The part `method` of the newest checkpoint, with the current keys; None if there is none."""
  about = _newest_about(workdir)
  return about and saved_config.of_run(about['method'])


def newest_held_out(workdir) -> dict | None:
  """The held-out inputs recorded in the newest checkpoint; None if there is none."""
  about = _newest_about(workdir)
  return about and about['data'].get('held_out', {})


def _newest_about(workdir) -> dict | None:
  steps = steps_in(workdir)
  if not steps:
    return None
  directory = _directory(workdir)
  with _reading(directory, steps[-1]):
    return _about(directory, steps[-1])


def load_trained(workdir, step=None):
  """Loads a run's trained parameters from `workdir/checkpoints`: (parameters, about, step).

  parameters: nested dict of NumPy arrays, as in `TrainState.params`. InputError if there is no such
  checkpoint, or if it is damaged.
  """
  directory = _directory(workdir)
  if not epath.Path(directory).is_dir():
    raise InputError(f'{directory} does not exist; name the workdir of a run')
  steps = _steps(directory)
  chosen = steps[-1] if step is None and steps else step
  if chosen not in steps:
    raise InputError(
      f'{directory} has the checkpoints {steps}, but none of step '
      f'{"any" if step is None else step}; name one that exists'
    )
  with _reading(directory, chosen):
    _check_whole(directory, chosen)
    about = _about(directory, chosen)
    return _read_params(epath.Path(directory) / str(chosen) / 'state'), about, chosen


def _read_params(folder):
  """Reads only the parameters; the optimizer's moments, twice as large, stay on disk."""
  handler = ocp.PyTreeCheckpointHandler()
  try:
    params = dict(handler.metadata(folder).tree)['params']
    target = {'params': jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), params)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
    return handler.restore(folder, args=args)['params']
  finally:
    handler.close()


def _about(directory, step):
  """The description of the run in a checkpoint."""
  path = epath.Path(directory) / str(step) / 'about' / 'metadata'
  found = json.loads(path.read_bytes())
  if not isinstance(found, dict):
    raise ValueError('its description of the run is not a JSON object')
  for part in ('method', 'data', 'model'):
    if not isinstance(found.get(part), dict):
      raise ValueError(f'its description of the run lacks {part!r}')
  return found


def _steps(directory) -> list[int]:
  folder = epath.Path(directory)
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _check_whole(directory, step):
  """ValueError unless the files of a checkpoint match its checksums.

  With several processes, each checks its part of the bytes; all get the same result.
  """
  fault, processes = '', jax.process_count()
  try:
    fault = _damage(directory, step, jax.process_index(), processes)
  except Exception as e:
    if processes == 1:
      raise
    fault = first_line(e)  # the others wait for this process's result
  if processes > 1 and multihost_utils.process_allgather(np.array(bool(fault))).any():
    fault = fault or 'another process found it damaged'
  if fault:
    raise ValueError(fault)


def _damage(directory, step, part=0, parts=1) -> str:
  """`checksums.damage` of a checkpoint; missing checksums are damage too."""
  folder = epath.Path(directory) / str(step)
  if checksums.exist(folder):
    return checksums.damage(folder, part, parts)
  if not any(folder.iterdir()):
    return 'it is empty'
  if _is_promised_checksums(folder):
    return f'{checksums.CHECKSUMS} is missing'
  if not part:
    cli.log(
      f'note         {folder} has no checksums (an earlier version wrote it): damage in it may go '
      'unnoticed'
    )
  return ''


def _is_promised_checksums(folder) -> bool:
  """Whether Orbax's metadata of a checkpoint says that it has checksums."""
  try:
    said = json.loads((folder / '_CHECKPOINT_METADATA').read_bytes())
    return checksums.CHECKSUMS in said['custom_metadata'].values()
  except (OSError, ValueError, LookupError, AttributeError, TypeError):
    return False  # a checkpoint of an earlier version may have lost it and still be intact


@contextlib.contextmanager
def _reading(directory, step):
  """Turns any error inside into the one-sentence InputError for an unreadable checkpoint."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  # Damage can make Orbax and its libraries fail anywhere, with any type of error.
  except Exception as e:
    if 'RESOURCE_EXHAUSTED: Out of memory' in str(e):
      raise
    if isinstance(e, OSError) and e.errno in NOT_ITS_FAULT:
      raise InputError(
        f'cannot read the checkpoint {directory}/{step} ({e.strerror}: {e.filename}); fix its '
        'permissions or the limit of open files: nothing in it is lost'
      ) from e
    raise InputError(
      f'cannot read the checkpoint {directory}/{step} ({first_line(e)}), which is not as the run '
      f'wrote it; {_way_out(directory, step)}'
    ) from e


def _way_out(directory, step):
  """Advice for a damaged checkpoint: use the newest intact one before it."""
  for before in reversed([s for s in _steps(directory) if s < step]):
    with contextlib.suppress(OSError):
      if not _damage(directory, before):
        workdir = os.path.dirname(directory)
        return (
          f'remove that folder to resume from the previous one, of step {before}, or name that one '
          f'as {workdir}@{before}'
        )
  return (
    'there is no intact one before it: restore that folder from a copy, or remove it to start over'
  )


# Writing.


@contextlib.contextmanager
def _writing(directory):
  """Turns any error inside, or earlier in the writer's thread, into a one-sentence InputError."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  # Full disk, no permission, too many open files: every layer below has its own error type.
  except Exception as e:
    raise InputError(
      f'cannot write a checkpoint to {directory} ({first_line(e)}); check its free space and '
      'permissions, then run the same command to resume from the last complete checkpoint'
    ) from e


def _is_no_repeat(record: logging.LogRecord) -> bool:
  """Whether to print a log record. Orbax logs the traceback of an error in its threads and then
  raises it in the next call, where `_writing` turns it into a sentence.
  """
  return not (record.exc_info and '/orbax/' in record.pathname)


class _Finishing:
  """Shared final steps of both kinds of unfinished checkpoints."""

  def __init__(self, temporary_path, final_path, *, checkpoint_metadata_store=None, **options):
    super().__init__(
      temporary_path, final_path, checkpoint_metadata_store=checkpoint_metadata_store, **options
    )
    self._store = checkpoint_metadata_store

  def _finish_metadata(self):
    """Makes Orbax's last change to a checkpoint: the completion time."""
    if self._store is None:
      return
    self._store.wait_until_finished()
    self._store.update(
      file_path=self.get() / '_CHECKPOINT_METADATA',
      commit_timestamp_nsecs=time.time_ns(),
    )
    self._store.wait_until_finished()


class _Checked(_Finishing, ocp.path.atomicity.AtomicRenameTemporaryPath):
  """An unfinished checkpoint: writes the checksums last, then renames it."""

  async def finalize(self):
    """Like Orbax's own, with checksums before the rename."""
    self._finish_metadata()
    if _is_whole(self.get_final()):
      checksums.write(self.get())
    self.get().rename(self.get_final())


class _CheckedInBucket(_Finishing, ocp.path.atomicity.CommitFileTemporaryPath):
  """Like `_Checked`, for stores where a final small file marks a checkpoint as complete."""

  async def finalize(self):
    """Like Orbax's own, with checksums before the last file."""
    self._finish_metadata()
    name = ocp.path.atomicity.COMMIT_SUCCESS_FILE
    if _is_whole(self.get_final()):
      checksums.write(self.get(), later={name: COMMITTED})
    (self.get() / name).write_bytes(COMMITTED)


def _is_whole(path) -> bool:
  """Whether this is a checkpoint, `checkpoints/<step>`; its parts are also renamed this way."""
  return path.name.isdecimal()


# Comparing.


def check_same_run(saved, now, directory):
  """InputError naming every difference in method, data or source model between a checkpoint's run
  and this run.

  Data and model are the same if their fingerprints match, wherever they are stored now.
  """
  different = saved_config.differences(
    saved_config.of_run(saved['method']), saved_config.of_run(now['method']), 'method.'
  )
  if saved['model']['fingerprint'] != now['model']['fingerprint']:
    different += saved_config.differences(saved['model'], now['model'], 'model.')
  advice = 'use the same method, data and model, or another --workdir'
  if _data_differ(saved['data'], now['data']):
    if not different:
      advice += ', or --accept_changed_data to resume with the current data'
    different += _data_differences(saved['data'], now['data'])
  if different:
    raise InputError(
      f'the checkpoints in {directory} belong to another run (checkpoint -> now: '
      f'{"; ".join(different)}); {advice}'
    )


def _data_differ(saved, now) -> bool:
  """Whether a checkpoint has other data. Earlier versions identified image folders only by file
  names.
  """
  return saved['fingerprint'] not in (now['fingerprint'], now.get('earlier_fingerprint'))


def _data_differences(saved, now) -> list[str]:
  """Descriptions of changed data: '6 pictures -> 5' if the numbers are known, then settings."""
  numbers = {name: part.get('number') or {} for name, part in (('saved', saved), ('now', now))}
  said = []
  for what in sorted(numbers['saved'].keys() & numbers['now'].keys()):
    before, after = numbers['saved'][what], numbers['now'][what]
    if before != after:
      said.append(f'{before} {what} -> {after}')
  settings = [
    {
      key: value
      for key, value in saved_config.completed({'data': part})['data'].items()
      if key not in ('number', 'earlier_fingerprint', 'held_out')
    }
    for part in (saved, now)
  ]
  return said + saved_config.differences(*settings, 'data.')


def num_bytes(tree):
  """Total bytes of all arrays of a pytree (not per device)."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fingerprint(tree):
  """SHA-256 of all arrays and their paths, equal exactly if all parameters are bitwise equal."""
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
  """The parts of a `TrainState` that a checkpoint saves: a dict of those that are not None."""
  parts = {name: getattr(state, attribute) for name, attribute in SAVED.items()}
  return {name: part for name, part in parts.items() if part is not None}


def _owned(tree):
  # On a CPU, the writer would otherwise read buffers that the next step overwrites by donation.
  return jax.tree.map(jnp.copy, tree) if jax.default_backend() == 'cpu' else tree


def _mib(n):
  return f'{n / 2**20:,.0f}'
