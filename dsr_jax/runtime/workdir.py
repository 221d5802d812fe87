"""The folder of a run: may it be written, who writes it, and the files that describe the run in
it.
"""

import contextlib
import fcntl
import glob
import importlib.metadata
import json
import os
import tempfile

from etils import epath
import jax

from dsr_jax import files, images, saved_config
from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics as metrics_lib

ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
MIRRORED = (
  'config.json',
  'metrics.jsonl',
  'summary.json',
  'report.html',
  'events',
  'samples',
  'evaluations',
)
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def check_writable(workdir):
  """InputError unless files can be made in `workdir`, or in the nearest folder above that exists;
  leaves nothing.
  """
  folder = os.path.abspath(workdir)
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise InputError(
      f'found that {workdir} cannot be written ({e.strerror}: {folder}); expected a folder to '
      'leave the '
      'run in; choose another --workdir'
    ) from e


def check_accelerator():
  """InputError if there is an accelerator that the installed JAX does not use, unless JAX was told
  to use the CPU.
  """
  if jax.default_backend() != 'cpu' or _told_to_use_cpu():
    return
  found = sorted(path for pattern in ACCELERATORS for path in glob.glob(pattern))
  if found:
    kind = 'gpu' if 'nvidia' in found[0] else 'tpu'
    raise InputError(
      f'found an accelerator ({found[0]}) that the installed JAX does not use; expected JAX for '
      'it; pip '
      f'install -r requirements-{kind}.txt, or set JAX_PLATFORMS=cpu to train on the CPU all the '
      'same'
    )


def _told_to_use_cpu():
  return 'cpu' in (jax.config.jax_platforms or '')  # JAX_PLATFORMS


def use_compile_cache(folder):
  """Keeps compiled programs in `folder`: a second start does not compile again."""
  folder = os.path.expanduser(folder)
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


@contextlib.contextmanager
def locked(workdir):
  """Makes the folder and holds it for this process. The lock goes with the process, however it
  ends.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    lock = open(os.path.join(workdir, '.lock'), 'a')
  except OSError as e:
    raise InputError(
      f'found that {workdir} cannot be written ({e.strerror}); expected a folder to leave the run '
      'in; '
      'choose another --workdir'
    ) from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise InputError(
        f'found another run at work in {workdir}; expected none; stop it, or choose another '
        '--workdir'
      ) from e
    yield


def about(config, source, data_fingerprint):
  """What a checkpoint says of its run; see `checkpoints.Checkpoints`."""
  settings = saved_config.to_json(config)
  data = {**settings['data'], 'fingerprint': data_fingerprint}
  return {'method': settings['method'], 'data': data, 'model': dict(source)}


def write_config(workdir, config, about):
  """config.json: every key as resolved, the model and data by fingerprint, the versions at work."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  content = {
    'config': saved_config.to_json(config),
    'about': about,
    'versions': versions,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }
  files.write_json(os.path.join(workdir, 'config.json'), content, indent=2, sort_keys=True)


def write_samples(workdir, step, image):
  """samples/STEP.png."""
  files.write_bytes(os.path.join(workdir, 'samples', f'{step:06d}.png'), images.png(image))


def write_evaluation(workdir, step, details):
  """evaluations/STEP.json: {name: rows of sums, a row a prompt or picture}, for
  `dsr_jax.effect`.
  """
  files.write_json(os.path.join(workdir, 'evaluations', f'{step:06d}.json'), details)


class Mirror:
  """Copies of the workdir's files in a bucket: a machine that is made anew finds them there. No
  bucket, nothing to do.
  """

  def __init__(self, workdir, bucket):
    self._local, self._bucket, self._seen = (
      epath.Path(workdir),
      epath.Path(bucket) if bucket else None,
      {},
    )

  def fetch(self):
    """Brings the files of an earlier start here, where this folder has none of its own."""
    if (
      self._bucket is None or not self._bucket.is_dir() or (self._local / metrics_lib.FILE).exists()
    ):
      return
    for path in self._files(self._bucket):
      files.write_bytes(self._local / path, (self._bucket / path).read_bytes())

  def push(self):
    """Copies what is new or has changed since the last time."""
    if self._bucket is None:
      return
    for path in self._files(self._local):
      stat = os.stat(self._local / path)
      if self._seen.get(path) != (stat.st_size, stat.st_mtime_ns):
        self._seen[path] = stat.st_size, stat.st_mtime_ns
        (self._bucket / path).parent.mkdir(parents=True, exist_ok=True)
        (self._bucket / path).write_bytes((self._local / path).read_bytes())

  @staticmethod
  def _files(folder):
    for child in folder.iterdir():
      if child.name in MIRRORED and child.is_dir():
        yield from (
          f'{child.name}/{inner.name}'
          for inner in child.iterdir()
          if not inner.name.endswith('.new')
        )
      elif child.name in MIRRORED:
        yield child.name


def write_summary(workdir, step, steps, parameters_sha256):
  """summary.json; returns its path. Rewards are means over the first and the last tenth of the
  steps.
  """
  curves = metrics_lib.read(workdir)
  evaluation, rewards = {}, {}
  for name, (at, values) in curves.items():
    if name.startswith('eval/'):
      before, after = values[0] if at[0] == 0 else None, values[-1] if at[-1] else None
      evaluation[name[5:]] = {'before': before, 'after': after, 'step': at[-1]}
    elif name.endswith(('/reward_mean', '/reward_frozen')):
      tenth = max(1, len(values) // 10)
      rewards[name] = {'before': sum(values[:tenth]) / tenth, 'after': sum(values[-tenth:]) / tenth}
  content = {
    'step': step,
    'steps': steps,
    'finished': step == steps,
    'parameters_sha256': parameters_sha256,
    'training_seconds': sum(curves.get('time/step_seconds', ([], []))[1]),
    'evaluation': evaluation,
    'rewards': rewards,
    'report': os.path.join(os.path.abspath(workdir), 'report.html'),
  }
  path = os.path.join(workdir, 'summary.json')
  return files.write_json(path, content, indent=2, sort_keys=True)


def table(workdir):
  """The summary for people: before, after, difference, and the 95 % interval of what has one."""
  with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
    summary = json.load(f)
  scores = summary['evaluation']
  rows = [(name, v) for name, v in scores.items() if not name.endswith(('_low', '_high'))]
  rows += summary['rewards'].items()
  width = max((len(name) for name, _ in rows), default=0)

  def number(value, form='.4f'):
    return '' if value is None else format(value, form)

  lines = ['', f'{"":{width}}    before     after    change']
  for name, v in rows:
    low, high = (scores.get(name + end, {}).get('after') for end in ('_low', '_high'))
    interval = '' if low is None else f'   [{low:.4f}, {high:.4f}]'
    change = None if v['before'] is None or v['after'] is None else v['after'] - v['before']
    cells = f'{number(v["before"]):>9} {number(v["after"]):>9} {number(change, "+.4f"):>9}'
    lines.append(f'{name:{width}} {cells}{interval}'.rstrip())
  return '\n'.join([*lines, '', f'report       {summary["report"]}'])
