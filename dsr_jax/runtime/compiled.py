"""Compiled steps: one a process for each kind of batch, and kept in a folder for the next start."""

import contextlib
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import threading
import time

from etils import epath
import flax
import jax
from jax.experimental import serialize_executable
import jaxlib
import optax

from dsr_jax.errors import InputError
from dsr_jax.runtime.progress import say

PACKAGE = pathlib.Path(__file__).parent.parent


class Programs:
  """The compiled step: one program, or one for each kind of batch where tasks take turns.

  step_fn: see `parts.Parts.make_step`. estimate: `plan_memory.Estimate`, or None. kept: `Kept`, or
    None.
  """

  def __init__(self, step_fn, estimate, kept=None):
    self._step_fn, self._estimate, self._kept, self._compiled = step_fn, estimate, kept, {}
    if estimate:
      say(estimate.line())

  def compile(self, state, batch):
    """Compiles for this kind of batch. Errors: InputError, after a table of bytes by part, where
    the devices have no room.
    """
    began, kind = time.perf_counter(), tuple(sorted(batch))
    program = self._kept.take(kind, state, batch) if self._kept else None
    done = 'loaded' if program else 'compiled'
    if not program:
      with self._room():
        with _collector_paused():
          lowered = self._step_fn.lower(state, batch)
        program = lowered.compile()
      if self._kept:
        self._kept.put(kind, program)
    self._compiled[kind] = program
    say(f'{done:<12} the step in {time.perf_counter() - began:.1f} s{_temporaries(program)}')

  def run(self, state, batch):
    """(state, batch) -> (state, metrics, records)."""
    kind = tuple(sorted(batch))
    if kind not in self._compiled:
      self.compile(state, batch)
    with self._room():
      return self._compiled[kind](state, batch)

  @contextlib.contextmanager
  def _room(self):
    try:
      yield
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e) or not self._estimate:
        raise
      say(self._estimate.table())
      raise InputError(
        f'found no room for the step on a device ({str(e).splitlines()[0][:200]}); expected less '
        'than it has; '
        f'{self._estimate.advice()}'
      ) from e


class Kept:
  """Compiled steps in a folder. Those of this very step are loaded in the background from the
  beginning on.

  A start that finds its own neither traces nor compiles. A file's name says what a step depends on:
  the step's own `identity`, this package's sources, versions, settings, flags and devices; the
  shapes are compared when it is used. With any difference the step is compiled, as it is where
  loading fails. devices: the mesh's, in its order. Files are JAX's serialized executables, which
  are pickles of machine code: whoever can write in the folder decides what is run, as with JAX's
  own cache of compiled programs beside them.
  """

  def __init__(self, folder: str, identity: str, devices):
    self._folder = epath.Path(os.path.expanduser(folder))
    self._found, self._devices = {}, list(devices)
    order = repr([d.id for d in self._devices])
    self._name = (
      'step-'
      + hashlib.sha256('\n'.join([identity, order, *environment()]).encode()).hexdigest()[:40]
    )
    self._thread = threading.Thread(target=self._load)
    self._thread.start()

  def take(self, kind, state, batch):
    """The program for this kind of batch, (state, batch) -> (state, metrics, records), or None."""
    self._thread.join()
    program = self._found.pop(self._file(kind), None)
    if program is None:
      return None

    def described(tree):
      return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    given = ((state, batch), {})
    same = jax.tree.structure(program.args_info) == jax.tree.structure(given) and described(
      program.args_info
    ) == described(given)
    return program if same else None

  def put(self, kind, program):
    """Keeps a program, whole or not at all."""
    file = self._folder / self._file(kind)
    aside = self._folder / f'{file.name}.{os.getpid()}'
    try:
      data = pickle.dumps(serialize_executable.serialize(program))
      self._folder.mkdir(parents=True, exist_ok=True)
      aside.write_bytes(data)
      aside.replace(file)
    except Exception as e:  # a run does without
      with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
      say(f'not kept     the compiled step ({_short(e)}); the next start compiles again')

  def _file(self, kind):
    return f'{self._name}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}'

  def _load(self):
    for file in self._folder.glob(f'{self._name}-????????') if self._folder.is_dir() else ():
      try:
        self._found[file.name] = serialize_executable.deserialize_and_load(
          *pickle.loads(file.read_bytes()), execution_devices=self._devices
        )
      except Exception as e:  # a run compiles
        say(f'not loaded   {file} ({_short(e)}); compiling')


def kept_in(folder: str, step_fn) -> Kept | None:
  """`Kept` of this step; None without a folder, for a step that does not say what it is, and for
  several processes, who must all have it or none.
  """
  identity = getattr(step_fn, 'identity', '')
  return (
    Kept(folder, identity, step_fn.devices)
    if folder and identity and jax.process_count() == 1
    else None
  )


def environment() -> list[str]:
  """All that a compiled step depends on besides what it was made from."""
  sources = hashlib.sha256()
  for file in sorted(PACKAGE.rglob('*.py')):
    sources.update(str(file.relative_to(PACKAGE)).encode() + b'\n' + file.read_bytes())
  devices = jax.devices()
  packages = (
    importlib.metadata.distributions() if devices[0].platform == 'gpu' else ()
  )  # whose libraries are packages of their own
  flags = sorted(
    (name, value)
    for name, value in os.environ.items()
    if name.startswith(('XLA_', 'LIBTPU_', 'TPU_', 'CUDA_', 'NVIDIA_'))
  )
  return [
    sources.hexdigest(),
    repr([m.__version__ for m in (jax, jaxlib, flax, optax)]),
    devices[0].client.platform_version,
    _processor(),
    repr([(d.id, d.device_kind) for d in devices]),
    repr(sorted(jax.config.values.items())),
    repr(sorted(f'{p.name} {p.version}' for p in packages)),
    repr(flags),
  ]


def _processor() -> str:
  """What machine code for this CPU may use."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  return repr(
    [
      next((line for line in lines if line.startswith(key)), '')
      for key in ('model name', 'flags', 'Features')
    ]
    + [os.cpu_count()]
  )


@contextlib.contextmanager
def _collector_paused():
  """For tracing, whose millions of objects nearly all stay: the garbage collector looks through
  them again and again, for a fifth of the time.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def _temporaries(compiled):
  analysis = compiled.memory_analysis()
  return (
    f'; {analysis.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries a device' if analysis else ''
  )


def _short(e):
  return f'{type(e).__name__}: {e}'.splitlines()[0][:120]
