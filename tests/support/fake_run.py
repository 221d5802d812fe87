"""A run whose step takes a millisecond: a small random matrix trained on random vectors, through
the real loop.

As a program, for tests that kill it; with a port, one of two processes:

  python tests/support/fake_run.py WORKDIR STEPS [DELAY] [--nan=STEP] [--port=P --process=I]
"""

import dataclasses
import sys
import time
import types

import jax
import jax.numpy as jnp
from micro_parts import MICRO, MicroConfig
import numpy as np
from places import CONFIGS

from dsr_jax import cli, config_loading, families, sharding, train
from dsr_jax import rows as rows_lib
from dsr_jax.runtime import distributed as processes
from dsr_jax.state import TrainState
from dsr_jax.step import StepOutput

SIZE = 64
TINY = str(CONFIGS / 'scenes_tiny.py')
jax.config.update(
  'jax_platforms', jax.config.jax_platforms or 'cpu'
)  # else an unused accelerator would be refused


def config(steps=12, **changes):
  """A Config of the fake run; changes as in config.load."""
  return config_loading.load(
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


def parts(delay=0.0, nan_at=None, evaluations=None) -> train.Builders:
  """delay: seconds a batch takes. nan_at: the step whose loss is NaN. evaluations: a list that gets
  evaluated steps.
  """

  def make_train_step(model, config, mesh, state):
    def step(state, batch):
      key = jax.random.fold_in(jax.random.key(batch['seed']), state.step)
      noise = jax.random.normal(key, (8, SIZE))

      def loss(w):
        error = batch['x'] @ w + 0.1 * noise - batch['x'] @ state.fixed_params['w']
        return jnp.mean(error**2)

      value, grad = jax.value_and_grad(lambda p: loss(p['w']))(state.params)
      momentum = 0.9 * state.opt_state['m'] + grad['w']
      done = state.step + 1
      new = dataclasses.replace(
        state,
        params={'w': state.params['w'] - config.method.learning_rate * momentum},
        opt_state={'m': momentum},
        step=done,
      )
      metrics = {
        'generation/reward_mean': -value,
        'loss': jnp.where(done == (nan_at or -1), jnp.nan, value),
      }
      return StepOutput(new, metrics, {'w': state.params['w'][:8, :8]})

    return jax.jit(step, donate_argnums=0)

  def batches(config, model, mesh, kept=None):
    del kept

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
      norm = float(jnp.linalg.norm(state.params['w']))
      first = float(state.params['w'][0, 0])
      scores = {
        'w/norm': norm,
        'w/norm_low': norm - 1,
        'w/norm_high': norm + 1,
        'w/first': first,
      }
      return scores, {'rows': [step]}

    return run

  def load(name):
    def draw(i):
      return np.random.default_rng(i).normal(size=(SIZE, SIZE)).astype(np.float32)

    return families.Model(
      graphdef=None,
      params={'w': draw(0), 'frozen': draw(1)},
      config=MicroConfig(),
      processor=None,
      source={'name': name, 'fingerprint': 'f' * 64},
      family=MICRO,
      spec=MICRO.spec(MicroConfig()),
    )

  def init(model, config, mesh):
    state = TrainState(
      step=np.int32(0),
      params={'w': model.params['w']},
      opt_state={'m': np.zeros((SIZE, SIZE), np.float32)},
      fixed_params={'w': model.params['frozen']},
    )
    placed = sharding.place(state, jax.tree.map(lambda x: sharding.whole(mesh), state))
    # The step donates it: no views of NumPy's memory.
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x))(placed)

  def rows(config, model):
    def candidates(state, records):
      pixels = (np.abs(np.asarray(records['w'])) * 50).astype(np.uint8)
      one = rows_lib.Candidates(
        task='generation',
        prompts=['the first rows of w'],
        codes=np.zeros((1, 1, 4), np.int32),
        pixels=np.repeat(pixels[None, None, :, :, None], 3, axis=-1),
        rewards=np.zeros((1, 1)),
        chosen=np.array([-1]),
        rejected=np.array([-1]),
      )
      return [one]

    return candidates

  return train.Builders(
    load_model=load,
    make_batches=batches,
    init_state=init,
    make_train_step=make_train_step,
    make_evaluator=evaluator,
    make_watcher=lambda *args: None,
    make_rows=rows,
    estimate_memory=lambda model, config, mesh: None,
  )


if __name__ == '__main__':
  nan = next((int(a[6:]) for a in sys.argv if a.startswith('--nan=')), None)
  port, process = (
    next((a.partition('=')[2] for a in sys.argv if a.startswith(f'--{name}=')), '')
    for name in ('port', 'process')
  )
  args = [a for a in sys.argv[1:] if not a.startswith('--')]
  cfg, made = config(int(args[1])), parts(float(args[2]) if len(args) > 2 else 0.0, nan)
  sys.argv = sys.argv[:1]

  def main(argv, f):
    with processes.together(
      processes.Cluster(f'localhost:{port}', 2, int(process)) if port else None, 120
    ) as team:
      print(train.run(cfg, args[0], made, team))

  cli.run_main(main, lambda f: None)
