"""What a person sees of a run, on stderr: a bar on a terminal, plain lines in a log. And the
signals that end it.
"""

import os
import signal
import statistics
import sys

import jax
import tqdm

from dsr_jax.runtime import checkpoints

_NAMED = 3  # prompts in a sentence


def say(text):
  """One line to stderr, above a bar if there is one; of several processes the first speaks."""
  if jax.process_index():
    return
  tqdm.tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


class StopSignals:
  """While it is entered, SIGTERM and the first Ctrl-C only set `requested`; the loop looks there
  after each step. Of several processes, JAX takes SIGTERM, for all of them, and Ctrl-C becomes one.
  """

  def __init__(self, processes=1):
    self._several = processes > 1

  def __enter__(self):
    self.requested = False
    self._old = {}
    for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._request)
    return self

  def _request(self, number, frame):
    del frame
    if not self.requested:
      print(
        f'stopping     on {signal.Signals(number).name}, after this step',
        file=sys.stderr,
        flush=True,
      )
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
    elif number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


class Progress:
  """Steps, rewards and time left."""

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
    """values: one evaluation's numbers; those with an interval are the chief ones."""
    chief = {name: value for name, value in values.items() if f'{name}_low' in values}
    values = chief or values
    words = (f'{name.removeprefix("eval/")} {value:.3f}' for name, value in values.items())
    say(f'evaluation   step {step}: {", ".join(words)}')

  def close(self):
    if self._bar is not None:
      self._bar.close()

  def _left(self, step):
    """Time left for steps alone, from the median so far: the first is slower, and evaluations are
    no steps.
    """
    minutes, seconds = divmod(round(statistics.median(self._seconds) * (self._steps - step)), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


class Silence:
  """As `Progress`, for a run among others that speak for it."""

  def step(self, step, values):
    """Nothing."""

  def evaluation(self, step, values):
    """Nothing."""

  def close(self):
    """Nothing."""


def describe_run(config, mesh, model, state, idle_bytes: int = 0):
  """Prints devices, mesh, model, parameters by part, and bytes a device of the state.

  idle_bytes: of the state, those that lie idle in a step.
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
    f'state        {_bytes_a_device(state) / 2**20:,.1f} MiB a device; a checkpoint '
    f'{checkpoint / 2**20:,.1f} MiB'
  )
  if idle_bytes:
    say(
      f'idle         {idle_bytes / 2**20:,.1f} MiB of the state: in a step the moments of one of '
      'the two models'
    )
  say(
    f'method       {m.objective}, {" and ".join(m.tasks)}, {m.inputs_per_step} inputs x '
    f'{m.group_size} candidates, '
    f'{m.steps} steps'
  )
  if model.spec and model.spec.sampling_steps:
    say(
      f'pictures     drawn in {m.sampling_steps} steps with noise {m.sampling_noise:g}; their '
      f'likelihood is an estimate, {m.picture_likelihood}; prompts lose {m.prompt_drop:.0%} of '
      f'their words in it ({m.prompt_drop_way})'
    )
  rate = f'{m.peak_learning_rate:g} at most ({m.learning_rate_key})'
  say(f'learning     {m.trainable}, at a rate of {rate}')
  if m.template:
    say(f'template     {m.template} (method.template)')


def say_unfamiliar(prompts):
  """Warns of prompts far outside what the model knows."""
  more = f' and {len(prompts) - _NAMED} more' if len(prompts) > _NAMED else ''
  say(
    f'warning      {len(prompts)} of the prompts lie far outside what the model knows, so their '
    f'rewards say little: {"; ".join(prompts[:_NAMED])}{more}'
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
