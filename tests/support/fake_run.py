"""A run whose step takes a millisecond: a small random matrix trained on random vectors, through
the real loop.

As a program: `python tests/support/fake_run.py WORKDIR STEPS [DELAY] [--nan=STEP] [--port=P --process=I]`,
  for tests that kill it; with a port, one of
two processes.
"""

import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from places import CONFIGS

from dsr_jax import config as config_lib
from dsr_jax import parts as parts_lib
from dsr_jax import sharding, train
from dsr_jax.runtime import distributed as processes

SIZE = 64
TINY = str(CONFIGS / 'scenes_tiny.py')
jax.config.update(
  'jax_platforms', jax.config.jax_platforms or 'cpu'
)  # else an unused accelerator would be refused


def config(steps=12, **changes):
  """A Config of the fake run; changes as in config.load."""
  return config_lib.load(
    TINY,
    **{
      'method__steps': steps,
      'method__learning_rate': 0.1,
      'system__save_every': 4,
      'system__eval_every': 6,
      'system__samples_every': 5,
      'system__log_every': 3,
      **changes,
    },
  )


def parts(delay=0.0, nan_at=None, evaluations=None):
  """delay: seconds a batch takes. nan_at: the step whose loss is NaN. evaluations: a list that gets
  evaluated steps.
  """

  def make_step(model, config, mesh):
    def step(state, batch):
      key = jax.random.fold_in(jax.random.key(batch['seed']), state['step'])
      noise = jax.random.normal(key, (8, SIZE))

      def loss(w):
        return jnp.mean((batch['x'] @ w + 0.1 * noise - batch['x'] @ state['frozen']['w']) ** 2)

      value, grad = jax.value_and_grad(lambda p: loss(p['w']))(state['params'])
      momentum = 0.9 * state['opt_state']['m'] + grad['w']
      done = state['step'] + 1
      new = {
        'params': {'w': state['params']['w'] - config.method.learning_rate * momentum},
        'frozen': state['frozen'],
        'opt_state': {'m': momentum},
        'step': done,
      }
      values = {
        'generation/reward_mean': -value,
        'loss': jnp.where(done == (nan_at or -1), jnp.nan, value),
      }
      return new, values, {'w': state['params']['w'][:8, :8]}

    return jax.jit(step, donate_argnums=0)

  def batches(config, model, mesh):
    def at(step):
      time.sleep(delay)
      rng = np.random.default_rng((config.method.seed, step))
      return {
        'seed': np.uint32(config.method.seed),
        'x': rng.normal(size=(8, SIZE)).astype(np.float32),
      }

    return types.SimpleNamespace(at=at, fingerprint=f'data of seed {config.method.seed}')

  def evaluator(config, model):
    def run(state, step):
      if evaluations is not None:
        evaluations.append(step)
      norm = float(jnp.linalg.norm(state['params']['w']))
      first = float(state['params']['w'][0, 0])
      return {'w/norm': norm, 'w/norm_low': norm - 1, 'w/norm_high': norm + 1, 'w/first': first}, {
        'rows': [step]
      }

    return run

  def load(name):
    def draw(i):
      return np.random.default_rng(i).normal(size=(SIZE, SIZE)).astype(np.float32)

    return parts_lib.Model(
      None, {'w': draw(0), 'frozen': draw(1)}, None, None, {'name': name, 'fingerprint': 'f' * 64}
    )

  def init(model, config, mesh):
    state = {
      'params': {'w': model.params['w']},
      'frozen': {'w': model.params['frozen']},
      'opt_state': {'m': np.zeros((SIZE, SIZE), np.float32)},
      'step': np.int32(0),
    }
    placed = sharding.place(state, jax.tree.map(lambda x: sharding.whole(mesh), state))
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x))(
      placed
    )  # the step donates it: no views of NumPy's memory

  def sheets(config, model):
    return lambda state, records: Image.fromarray(
      (np.abs(np.asarray(records['w'])) * 50).astype(np.uint8)
    )

  return parts_lib.Parts(
    load_model=load,
    make_mesh=sharding.make_mesh,
    make_batches=batches,
    init_state=init,
    make_step=make_step,
    make_evaluator=evaluator,
    make_sheets=sheets,
  )


if __name__ == '__main__':
  from dsr_jax import errors

  nan = next((int(a[6:]) for a in sys.argv if a.startswith('--nan=')), None)
  port, process = (
    next((a.partition('=')[2] for a in sys.argv if a.startswith(f'--{name}=')), '')
    for name in ('port', 'process')
  )
  args = [a for a in sys.argv[1:] if not a.startswith('--')]
  cfg, made = config(int(args[1])), parts(float(args[2]) if len(args) > 2 else 0.0, nan)
  sys.argv = sys.argv[:1]

  def main(argv):
    with processes.together(
      processes.Cluster(f'localhost:{port}', 2, int(process)) if port else None, 120
    ) as team:
      print(train.run(cfg, args[0], made, team))

  errors.run_main(main)
