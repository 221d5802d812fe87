"""Progress output of a run on stderr (a bar on a terminal, plain lines in a log), and the signals
that end the run.
"""

import contextlib
import os
import signal
import statistics
import sys

import jax
import tqdm

from dsr_jax import environment
from dsr_jax.runtime import checkpoints

_NAMED = 3  # prompts that a sentence quotes


def say(text):
  """Prints a line to stderr, above the bar if any. Only the first of several processes prints."""
  if jax.process_index():
    return
  tqdm.tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


class Stopped(KeyboardInterrupt):
  """A signal arrived during work that is abandoned at once. If a callback swallows it, the process
  ends, as with every KeyboardInterrupt.
  """


class StopSignals:
  """Context in which SIGTERM and the first Ctrl-C only set `requested`, which the loop checks after
  each step. The second Ctrl-C ends the process at once.

  Ending at any moment loses nothing: the run resumes from its last checkpoint. So during
  compilation, the first signal also ends the process, and work under `leaving` is abandoned.

  With several processes, JAX handles SIGTERM for all of them, and Ctrl-C becomes a SIGTERM; all do
  the same work until they stop together, so no process abandons work alone.
  """

  def __init__(self, processes=1):
    self._several = processes > 1
    # Seconds after which a signal ends the process if its main thread has not returned to Python.
    self._patience: float | None = None
    self._may_leave = False

  def __enter__(self):
    self.requested = self._said = False
    self._interrupts = 0
    self._watch = environment.SignalWatch(self._heard).__enter__()
    self._old = {}
    for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    self._watch.__exit__()

  @contextlib.contextmanager
  def compiling(self):
    """The first signal ends the process: the compiler cannot be interrupted."""
    with self._phase(None if self._several else 0.0):
      yield

  @contextlib.contextmanager
  def leaving(self):
    """The first signal raises `Stopped` here as soon as Python regains control, or ends the process
    if that takes long.
    """
    if self._several:
      yield
      return
    with self._phase(environment.PATIENCE_SECONDS):
      self._may_leave = True
      try:
        if self.requested:
          raise Stopped
        yield
      finally:
        self._may_leave = False

  @contextlib.contextmanager
  def _phase(self, patience):
    self._patience = patience
    try:
      yield
    finally:
      self._patience = None
      self._watch.came_back()

  def _heard(self, number):
    """Called in the watching thread, at once."""
    if number not in self._old:
      return None
    if number == signal.SIGINT:
      self._interrupts += 1
      if self._interrupts > 1:
        return 0.0
    if self._said:
      return None
    self.requested = self._said = True
    if self._patience != 0:
      name = signal.Signals(number).name
      with contextlib.suppress(OSError, RuntimeError):  # another line may be in progress
        print(f'stopping     on {name}, after this step', file=sys.stderr, flush=True)
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
    return self._patience

  def _handle(self, number, frame):
    """Called in the main thread, when it returns to Python."""
    del frame
    self.requested = True
    if self._patience == 0:
      environment.end_by_signal(number)
    if self._may_leave:
      self._may_leave = False
      self._watch.came_back()
      environment.leave_at_work()
      raise Stopped


class Progress:
  """Shows steps, rewards and remaining time."""

  def __init__(self, start, steps):
    self._steps, self._last, self._seconds = steps, start, []
    self._bar = None
    if sys.stderr.isatty() and start < steps and not jax.process_index():
      self._bar = tqdm.tqdm(
        total=steps, initial=start, unit='step', file=sys.stderr, dynamic_ncols=True, smoothing=0.1
      )

  def step(self, step, values):
    """values: a step's metrics."""
    rewards = {
      short: values[name]
      for short, name in (('R_G', 'generation/reward_mean'), ('R_U', 'understanding/reward_mean'))
      if name in values
    }
    self._seconds.append(values['time/step_seconds'])
    if jax.process_index():
      return
    if self._bar is not None:
      self._bar.set_postfix({k: f'{v:.3f}' for k, v in rewards.items()}, refresh=False)
      self._bar.update(step - self._last)
    else:
      words = [
        f'step {step}/{self._steps}',
        *(f'{k} {v:.3f}' for k, v in rewards.items()),
        f'{values["time/step_seconds"]:.2f} s',
        f'{self._left(step)} left',
      ]
      print('  '.join(words), file=sys.stderr, flush=True)
    self._last = step

  def evaluation(self, step, values):
    """values: the numbers of an evaluation; those with an interval are the main ones."""
    chief = {name: value for name, value in values.items() if f'{name}_low' in values}
    values = chief or values
    words = (f'{name.removeprefix("eval/")} {value:.3f}' for name, value in values.items())
    say(f'evaluation   step {step}: {", ".join(words)}')

  def close(self):
    if self._bar is not None:
      self._bar.close()

  def _left(self, step):
    """Remaining time for steps only, from the median step time so far: the first step is slower,
    and evaluations are not steps.
    """
    minutes, seconds = divmod(round(statistics.median(self._seconds) * (self._steps - step)), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


class Silence:
  """Like `Progress`, but silent, for a run whose caller prints the progress."""

  def step(self, step, values):
    """Nothing."""

  def evaluation(self, step, values):
    """Nothing."""

  def close(self):
    """Nothing."""


def describe_run(config, mesh, model, state, idle_bytes: int = 0):
  """Prints devices, mesh, model, parameters by part, and the state's bytes per device.

  idle_bytes: bytes of the state that a step does not use.
  """
  devices = jax.devices()
  parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in model.params.items()}
  trainable = sum(x.size for x in jax.tree.leaves(state.params))
  by_part = ', '.join(
    f'{name} {_count(n)}' for name, n in sorted(parts.items(), key=lambda item: -item[1])
  )
  m = config.method
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  say(f'devices      {len(devices)} x {devices[0].device_kind}; mesh {axes}')
  say(f'model        {model.source["name"]} ({model.source["fingerprint"][:12]})')
  say(f'parameters   {_count(sum(parts.values()))}: {by_part}; trained: {_count(trainable)}')
  checkpoint = checkpoints.num_bytes(checkpoints.saved_part(state))
  say(
    f'state        {_bytes_a_device(state) / 2**20:,.1f} MiB per device; a checkpoint '
    f'{checkpoint / 2**20:,.1f} MiB'
  )
  if idle_bytes:
    say(
      f'idle         {idle_bytes / 2**20:,.1f} MiB of the state: each step uses the moments of '
      'only one of the two models'
    )
  say(
    f'method       {m.objective}, {" and ".join(m.tasks)}, {m.inputs_per_step} inputs x '
    f'{m.group_size} candidates, '
    f'{m.steps} steps'
  )
  if model.spec.sampling_steps:
    say(
      f'images       drawn in {m.sampling_steps} steps with noise {m.sampling_noise:g}; their '
      f'likelihood is an estimate, {m.picture_likelihood}, with {m.prompt_drop:.0%} of the prompt '
      f'tokens dropped ({m.prompt_drop_way})'
    )
  rate = f'at most {m.peak_learning_rate:g} ({m.learning_rate_key})'
  say(f'learning     {m.trainable}, at a rate of {rate}')
  if m.template:
    say(f'template     {m.template} (method.template)')


def say_unfamiliar(prompts):
  """Warns of prompts far outside the model's training distribution."""
  more = f' and {len(prompts) - _NAMED} more' if len(prompts) > _NAMED else ''
  say(
    f'warning      {len(prompts)} of the prompts are far outside what the model knows, so their '
    f'rewards mean little: {"; ".join(prompts[:_NAMED])}{more}'
  )


def _bytes_a_device(tree):
  def here(x):
    return x.addressable_shards[0].data if isinstance(x, jax.Array) else x

  return sum(here(x).nbytes for x in jax.tree.leaves(tree))


def _count(n):
  for size, unit in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return str(n)
