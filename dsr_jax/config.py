"""The configuration: every key, its default and its meaning.

The files of `dsr_jax/configs/` build a locked `ConfigDict`; `config_loading` checks it and turns it
into these frozen dataclasses once, at the border. The default of a key is on the line of its field
and nowhere else. `method`, `data` and `model` decide what is learned, so a resumed run must have
the same; `system` and `eval` decide how it is computed and what is watched, and may change.

This module imports nothing of the package, so every other one may import it.
"""

import dataclasses

import ml_collections

TASKS = ('unified', 'generation', 'understanding')
STRATEGIES = ('unified', 'separate')
# The two models of `separate`, and the task that each learns.
ROLES = {'generator': 'generation', 'understander': 'understanding'}
SCORERS = ('policy', 'frozen', 'ema')
TRAINABLE = ('language_model+gen_head', 'language_model', 'all_but_vq', 'lora')
PICTURE_LIKELIHOODS = ('one_step', 'elbo')
PROMPT_DROP_WAYS = ('delete', 'hide', 'mask')
KL_ESTIMATORS = ('k1', 'k2', 'k3')
CROPS = ('crop', 'pad')
DTYPES = ('float32', 'bfloat16')
CACHE_DTYPES = ('', 'int8')
BAD_IMAGES = ('error', 'skip')
BENCHMARKS = ('auto', 'scenes', 'own', 'none')
TRACKERS = ('', 'wandb')


@dataclasses.dataclass(frozen=True)
class Grpo:
  """objective=grpo, dr_grpo, rloo: the ratio counts between 1 - ratio_low and 1 + ratio_high."""

  ratio_low: float = 0.2
  ratio_high: float = 0.28


@dataclasses.dataclass(frozen=True)
class Gspo:
  """objective=gspo: the same bounds, on the mean ratio of a sequence."""

  ratio_low: float = 3e-4
  ratio_high: float = 4e-4


@dataclasses.dataclass(frozen=True)
class Cispo:
  """objective=cispo."""

  ratio_max: float = 5.0  # the largest weight of a token


@dataclasses.dataclass(frozen=True)
class Dpo:
  """objective=online_dpo."""

  beta: float = 0.1


@dataclasses.dataclass(frozen=True)
class Lora:
  """trainable=lora."""

  rank: int = 16
  # in the place of method.learning_rate: adapters begin at zero, and move less at the same rate
  learning_rate: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Separate:
  """strategy=separate."""

  swap_every: int = 44  # steps of a turn; 44 are an epoch of 5,600 inputs


@dataclasses.dataclass(frozen=True)
class ClipReward:
  """reward=clip."""

  model: str = ''  # a directory of a CLIPModel in the Hugging Face layout


@dataclasses.dataclass(frozen=True)
class ExternalReward:
  """reward=external: who is asked about each task, 'module:function' of Python or 'http://...'.

  '' is nobody. $VARIABLES are replaced when it is asked, so that a server may move.
  """

  generation: str = ''
  understanding: str = ''


@dataclasses.dataclass(frozen=True)
class Method:
  """What is learned and from what. Rewards and log-probabilities are in nats a token.

  Keys that matter under one choice only are in a group of that choice.
  """

  objective: str = 'simpo'  # eq. 5; all of them: `losses.OBJECTIVES`
  task: str = 'unified'  # both tasks in every step; or 'generation', 'understanding' alone
  # 'unified': one model. 'separate': a generator and an understander learn in turns, and each is
  # scored by the other.
  strategy: str = 'unified'
  separate: Separate = Separate()
  # eq. 3; all of them: `rewards.table.REWARDS`; or a weighted sum such as 'dual+0.3*clip'
  reward: str = 'dual'
  # Eq. 3. 'policy': the live model, in 'separate' the other one. 'frozen': the initial model.
  # 'ema': a running mean of the trained parameters.
  scorer: str = 'policy'
  ema_decay: float = 0.99
  judge_accuracy: float = 1.0  # of the reward 'judge': other verdicts are turned around
  clip_reward: ClipReward = ClipReward()
  external_reward: ExternalReward = ExternalReward()
  # of the reward 'vqa'; {} is the text
  yes_question: str = 'Does this image show {}? Answer yes or no.'
  group_size: int = 8  # candidates an input
  inputs_per_step: int = 128  # prompts and pictures together, half of each in 'unified'
  # equal parts of a step's inputs; each is sampled and differentiated on its own before one update
  accumulate: int = 1
  steps: int = 438  # 5 epochs of 5,600 prompts and 5,600 pictures
  beta: float = 2.0
  gamma: float = 0.5
  # updates on each batch of samples; more than 1 only for objectives that can learn off-policy
  inner_updates: int = 1
  grpo: Grpo = Grpo()
  gspo: Gspo = Gspo()
  cispo: Cispo = Cispo()
  dpo: Dpo = Dpo()
  # weight of the KL to the initial model, in objectives of whole groups; 0 is none and needs no
  # copy of that model
  kl: float = 0.04
  kl_estimator: str = 'k3'
  min_margin: float = 0.0  # the loss drops pairs whose rewards differ by no more than this
  temperature: float = 1.0  # of sampling, and of every log-probability in the loss
  guidance: float = 5.0  # classifier-free, while pictures are sampled; 1 is off. Never in rewards
  # guided codes of a sampled picture, from its first; the others cost half. 0: all are guided
  cfg_interval: int = 0
  # whether the loss is about the guided mixture that sampled, not the plain conditional
  policy_guidance: bool = False
  # Of models that draw by unmasking (Show-o), whose likelihood of a picture is an estimate:
  # 'one_step': all codes masked, scored at once. 'elbo': the bound of masked diffusion
  picture_likelihood: str = 'one_step'
  elbo_draws: int = 1  # whose mean the bound is
  # the share of a prompt's words dropped at random in the loss; -1: the family's own. Never in
  # rewards
  prompt_drop: float = -1.0
  prompt_drop_way: str = 'delete'  # or 'hide' from the others, or replace by the 'mask' token
  sampling_steps: int = -1  # of a picture; -1: the model's own number
  sampling_noise: float = -1.0  # by which codes are kept, at the first step; -1: the model's own
  max_text_tokens: int = 256
  # the words that frame prompts and questions, a value of the model's family: of Janus 'tokens'
  # (<|User|>) or 'plain' (User), of Show-o 'demo' or 'tuned'. '': the model's own, which the run
  # then saves by name
  template: str = ''
  eos_in_reward: bool = False  # whether R_G counts the end-of-text token of the prompt
  question: str = 'Describe this image in detail.'  # asked for the sampled texts
  # stands before the prompt in R_G; '' is none
  instruction: str = 'Describe this image in detail.'
  # of pictures: the centre square, or 'pad' to a square; for the vision tower and the VQ encoder
  crop: str = 'crop'
  # 'lora': adapters on the projections of the language model
  trainable: str = 'language_model+gen_head'
  lora: Lora = Lora()
  learning_rate: float = 3e-6  # of the weights themselves; that of adapters is in `lora`
  warmup_steps: int = 5  # then a cosine to 0 at the last step
  adam_b1: float = 0.9
  adam_b2: float = 0.999
  weight_decay: float = 0.0
  clip: float = 1.0  # the largest norm of the whole gradient (max_grad_norm)
  seed: int = 0

  @property
  def peak_learning_rate(self) -> float:
    """The rate of what is trained, before its schedule."""
    return self.lora.learning_rate if self.trainable == 'lora' else self.learning_rate

  @property
  def learning_rate_key(self) -> str:
    """The key of that rate."""
    return 'method.lora.learning_rate' if self.trainable == 'lora' else 'method.learning_rate'

  @property
  def tasks(self):
    """The tasks of a step, a tuple."""
    return ('generation', 'understanding') if self.task == 'unified' else (self.task,)

  @property
  def inputs_per_task(self):
    """B: prompts in a step's generation half, and pictures in its understanding half."""
    return self.inputs_per_step // (1 if self.strategy == 'separate' else len(self.tasks))

  def external_source(self, task) -> str:
    """Who is asked outside of the step about a task's candidates; '' for nobody."""
    asked = self.external_reward
    return asked.generation if task == 'generation' else asked.understanding

  def role_at(self, step):
    """Who learns in step `step` (from 0) of 'separate', the generator first; None for one model."""
    if self.strategy != 'separate':
      return None
    return tuple(ROLES)[step // self.separate.swap_every % 2]

  def tasks_at(self, step):
    """The tasks of step `step` (from 0), a tuple."""
    return (ROLES[self.role_at(step)],) if self.strategy == 'separate' else self.tasks


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; -1, once at most, takes those that are left."""

  data: int = 1
  fsdp: int = -1
  tp: int = 1


@dataclasses.dataclass(frozen=True)
class System:
  """How it is computed, logged and kept. Nothing here changes what is learned, beyond rounding."""

  mesh: Mesh = Mesh()
  rollout_chunk: int = 0  # inputs sampled and scored at once; 0: all of a part
  update_chunk: int = 0  # inputs differentiated at once; 0: all of a part
  remat: bool = True  # recompute each layer in the backward pass
  compute_dtype: str = 'bfloat16'
  # of the candidates' keys and values: as compute_dtype, or 'int8', for which GPUs have no kernel
  # here
  cache_dtype: str = ''
  logprob_chunk: int = 128  # positions whose logits are held at once; 0: all
  # tokens between two growths of the cache; more make a shorter program that reads more unfilled
  # room
  decode_segment: int = 16
  # one program for all layers while decoding: for large models on TPUs; elsewhere each layer would
  # be copied at each token
  decode_scan: bool = False
  # gs://BUCKET/FOLDER, or a folder that all processes share: holds the checkpoints, and copies of
  # the workdir's files
  bucket: str = ''
  compile_cache: str = ''  # folder of compiled programs, spares the second start; '' is none
  log_every: int = 10  # steps between fetches of metrics; each step has its line all the same
  # steps between scores by the frozen initial model; 0 never, and frees its copy
  frozen_every: int = 10
  # steps between scores of swapped prompts and of coarse pictures, a forward pass each; 0 never
  probe_every: int = 0
  samples_every: int = 50  # steps between pictures, and rows, of all candidates; 0 never
  eval_every: int = 100  # steps between evaluations; 0 only before and after
  save_every: int = 50  # steps between checkpoints; the last step always has one
  keep_last: int = 2
  keep_every: int = 0  # steps whose multiples are kept for good; 0 none
  external_seconds: float = 60.0  # that reward=external may take for an answer
  external_retries: int = 2  # further requests to an 'http://...' that does not answer
  track: str = ''  # 'wandb': metrics and pictures also go to Weights & Biases; '' nowhere


@dataclasses.dataclass(frozen=True)
class Data:
  """Where inputs come from."""

  # 'scenes', 't2i_compbench', or a file with a line a prompt; or several, with so many of each:
  # 't2i_compbench:1000+mine.txt'
  prompts: str = 'scenes'
  # 'scenes', a prepared set ('coco', 'journeydb'), or a folder; or 'coco:2800+journeydb:2800'
  images: str = 'scenes'
  data_dir: str = '~/tensorflow_datasets'  # where prepared sets lie, also gs://BUCKET/FOLDER
  seed: int = 0  # which ones, where a number is named
  # of pictures that do not decode: 'error' names them all, 'skip' leaves them out and counts them
  bad_images: str = 'error'
  max_prompt_tokens: int = 64  # a longer prompt is an error, not a cut


@dataclasses.dataclass(frozen=True)
class Eval:
  """The fixed lists both tasks are measured on, at the run's temperature and guidance."""

  # 'scenes': judged pictures, descriptions and questions of the small world. 'own': the run's own
  # data, the fixed list below, of what is not learned from. 'auto': 'scenes' where prompts and
  # pictures are, else 'own'. 'none'
  benchmark: str = 'auto'
  prompts_per_task: int = 100  # before and after
  images_per_prompt: int = 4
  pictures: int = 1000  # described before and after
  quick_prompts_per_task: int = 16  # during
  quick_pictures: int = 64
  chunk: int = 50  # prompts or pictures at once
  # prompts, and pictures, that are drawn and described at every evaluation with the same keys, and
  # scored by the initial model; 0: none
  watched: int = 24
  # 'own': the share of the run's own files that is not learned from but measured on, in place of
  # the list of `watched`: 4 at least, 64 at most; 0: none, and all is learned from
  held_out: float = 0.1
  # the initial model is also measured at these two, its best on validation; -1: it is not
  tuned_temperature: float = -1.0
  tuned_guidance: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: str = 'scenes'  # 'scenes' is the embedded one; else a directory in the Hugging Face layout
  method: Method = Method()
  system: System = System()
  data: Data = Data()
  eval: Eval = Eval()


def defaults():
  """Every key at its default, as an unlocked ConfigDict for a config file to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))
