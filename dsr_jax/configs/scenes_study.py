"""The study: the paper's claims on Scenes, with controls.

Each cell is a run of a few minutes on two CPU cores.

  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study --tune
  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study

`run` is the cell that each variant (dsr_jax/study/variants.py) changes a little; the other settings
say how much is measured.
"""

from ml_collections import ConfigDict

from dsr_jax.configs import common


def get_config():
  """The study."""
  c = ConfigDict()
  # name -> model; the first is used for the controls, all are used for the paper's variants
  c.bases = dict(scenes='scenes')
  c.seeds = 5  # of the paper's variants: 0, 1, ...
  c.control_seeds = 2  # of controls, and of the degraded judge
  c.run = _run()

  c.tune = ConfigDict()  # on the validation lists, which no table uses; equal for all variants
  # the middle one is best for SimPO, the highest for GRPO; still higher is worse (docs/study)
  c.tune.learning_rates = (5e-5, 2e-4, 8e-4)
  c.tune.seed = 1000  # of training; no table uses it
  c.tune.prompts_per_task = 60
  c.tune.pictures = 300
  c.tune.temperatures = (0.25, 0.5, 0.75, 1.0)  # of the base at its best settings
  c.tune.guidances = (1.0, 1.5, 2.0, 3.0)

  c.measure = ConfigDict()
  # the first ones of the list, for "at least one of many samples is right"
  c.measure.many_prompts_per_task = 40
  c.measure.many = 8
  # prompts, and as many images, whose candidates the scorers rank at each evaluation
  c.measure.scorer_inputs = 16
  c.measure.reward_inputs = 64  # the same for each variant's reward, once, on the base

  c.clip = ConfigDict()  # for the CLIP reward, trained on pretraining's captioned images
  c.clip.steps = 3000
  c.clip.batch = 64
  c.clip.learning_rate = 1e-3
  c.clip.seed = 0
  c.lock()
  return c


def _run():
  config = common.on_scenes()
  m = config.method
  m.inputs_per_step = 32  # 16 prompts and 16 images, 8 candidates each
  m.steps = 36
  m.learning_rate = 5e-5  # unless it was tuned
  m.separate.swap_every = 9
  s = config.system
  s.frozen_every = 0  # the frozen model scores at each evaluation instead
  s.eval_every = 9  # a quarter of the run; a variant with more steps has as many evaluations
  s.save_every = 9
  s.keep_last = 1
  e = config.eval
  e.prompts_per_task = 300
  e.images_per_prompt = 2
  e.pictures = 600
  e.quick_prompts_per_task = 24
  e.quick_pictures = 96
  return config
