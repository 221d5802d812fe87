"""How far adapters move at the learning rate of the weights themselves, and at their own.

  python -m benchmarks.adapter_rate [--steps=4]

Runs the real step on the embedded model, with trainable=lora at both rates and with the language
model itself at the first rate, on the same batches. A change is measured in the kernels that have
adapters: the norm of what was added, divided by the norm of the kernel. docs/robustness_numbers.md
has the result.
"""

from absl import flags
import jax
import numpy as np

from dsr_jax import cli, config_loading, train
from dsr_jax import state as state_lib

# What is trained -> its learning rates. They are inputs of the step's program, as in the study.
RUNS = {'lora': (3e-6, 1e-4), 'language_model': (3e-6,)}


def config_of(trainable: str, steps: int):
  """The paper's SimPO on Scenes, without warm-up."""
  return config_loading.load(
    'scenes',
    method__objective='simpo',
    method__trainable=trainable,
    method__steps=steps,
    method__warmup_steps=0,
    method__inputs_per_step=4,
    method__group_size=4,
  )


def movements(config, rates):
  """Yields the relative change of the adapted kernels after the run's steps, for each rate."""
  builders = train.Builders()
  mesh = builders.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh):
    model, config = train.framed(builders.load_model(config.model), config)
    batches = builders.make_batches(config, model, mesh)
    state = builders.init_state(model, config, mesh)
    step = builders.make_train_step(model, config, mesh, state)
    before = kernels(state_lib.policy_params(state, model.family), model.family)
    for rate in rates:
      state = builders.init_state(model, config, mesh)
      for i in range(config.method.steps):
        state, _, _ = step(state, batches.at(i)._replace(learning_rate=np.float32(rate)))
      after = kernels(state_lib.policy_params(state, model.family), model.family)
      moved = sum(np.sum((b - a) ** 2) for a, b in zip(before, after))
      yield float(np.sqrt(moved / sum(np.sum(a**2) for a in before)))


def kernels(params, family) -> list[np.ndarray]:
  """The kernels that have adapters, float64."""
  found = []
  for path in family.lora_targets.values():
    node = params
    for name in path:
      node = node[name]
    found.append(np.asarray(node['kernel'], np.float64))
  return found


def main(argv, f=flags.FLAGS):
  """Prints one line per run."""
  cli.no_arguments(argv)
  for trainable, rates in RUNS.items():
    for rate, found in zip(rates, movements(config_of(trainable, f.steps), rates)):
      print(f'{trainable:<16} {rate:g}  {found:.3e}', flush=True)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('steps', 4, 'Steps of each run.', lower_bound=1, flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
