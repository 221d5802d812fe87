"""The study: the paper's claims on Scenes, with controls.

Every cell is a run of a few minutes on two CPU cores.

  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study --tune
  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study

`run` is the cell that all variants (dsr_jax/study/variants.py) change a little; the rest says how
much is measured.
"""

from ml_collections import ConfigDict

from dsr_jax.configs import common


def get_config():
  """The study."""
  c = ConfigDict()
  # name -> model; the first carries the controls, all of them the paper's variants
  c.bases = dict(scenes='scenes')
  c.seeds = 5  # of the paper's variants: 0, 1, ...
  c.control_seeds = 2  # of controls, and of the degraded judge
  c.run = _run()

  c.tune = ConfigDict()  # on the validation lists, which no table uses; the same for every variant
  # SimPO likes the middle one, GRPO the highest, and not the next (docs/study)
  c.tune.learning_rates = (5e-5, 2e-4, 8e-4)
  c.tune.seed = 1000  # of training, none of the tables'
  c.tune.prompts_per_task = 60
  c.tune.pictures = 300
  c.tune.temperatures = (0.25, 0.5, 0.75, 1.0)  # of the base at its best settings
  c.tune.guidances = (1.0, 1.5, 2.0, 3.0)

  c.measure = ConfigDict()
  # the beginning of the list, for "at least one of many samples is right"
  c.measure.many_prompts_per_task = 40
  c.measure.many = 8
  # prompts and as many pictures whose candidates the scorers order, at each evaluation
  c.measure.scorer_inputs = 16
  c.measure.reward_inputs = 64  # the same for each variant's reward, once, on the base

  c.clip = ConfigDict()  # the CLIP of the CLIP reward, made from pretraining's captioned pictures
  c.clip.steps = 3000
  c.clip.batch = 64
  c.clip.learning_rate = 1e-3
  c.clip.seed = 0
  c.lock()
  return c


def _run():
  config = common.on_scenes()
  m = config.method
  m.inputs_per_step = 32  # 16 prompts and 16 pictures, 8 candidates each
  m.steps = 36
  m.learning_rate = 5e-5  # where nothing was tuned
  m.separate.swap_every = 9
  s = config.system
  s.frozen_every = 0  # the frozen model's opinion is asked at each evaluation instead
  s.eval_every = 9  # a quarter of the run; a variant of more steps keeps as many evaluations
  s.save_every = 9
  s.keep_last = 1
  e = config.eval
  e.prompts_per_task = 300
  e.images_per_prompt = 2
  e.pictures = 600
  e.quick_prompts_per_task = 24
  e.quick_pictures = 96
  return config
