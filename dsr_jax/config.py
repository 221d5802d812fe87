"""The configuration: every key, its default and its meaning.

The files in `dsr_jax/configs/` build a locked `ConfigDict`; `config_loading` checks it once, before
any work, and converts it to these frozen dataclasses. The line of a field is the only place for the
default of its key. `method`, `data` and `model` determine what the model learns, so a resumed run
must have the same values; `system` and `eval` determine how it is computed and evaluated, and may
change.

This module imports nothing from the package, so every other module may import it.
"""

import dataclasses

import ml_collections

TASKS = ('unified', 'generation', 'understanding')
STRATEGIES = ('unified', 'separate')
# The two models of `separate`, and the task that each one learns.
ROLES = {'generator': 'generation', 'understander': 'understanding'}
SCORERS = ('policy', 'frozen', 'ema')
TRAINABLE = ('language_model+gen_head', 'language_model', 'all_but_vq', 'lora')
PICTURE_LIKELIHOODS = ('one_step', 'elbo')
CREDITS = ('equal', 'guidance', 'rarity', 'early', 'attribution')
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
  """objective=grpo, dr_grpo, rloo: clips the ratio to [1 - ratio_low, 1 + ratio_high]."""

  ratio_low: float = 0.2
  ratio_high: float = 0.28


@dataclasses.dataclass(frozen=True)
class Gspo:
  """objective=gspo: the same bounds, for a sequence's mean ratio."""

  ratio_low: float = 3e-4
  ratio_high: float = 4e-4


@dataclasses.dataclass(frozen=True)
class Cispo:
  """objective=cispo."""

  ratio_max: float = 5.0  # the maximum weight of a token


@dataclasses.dataclass(frozen=True)
class Dpo:
  """objective=online_dpo."""

  beta: float = 0.1


@dataclasses.dataclass(frozen=True)
class Lora:
  """trainable=lora."""

  rank: int = 16
  # replaces method.learning_rate: adapters start at zero and move less at the same rate
  learning_rate: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Separate:
  """strategy=separate."""

  swap_every: int = 44  # steps per turn; 44 steps are one epoch of 5,600 inputs


@dataclasses.dataclass(frozen=True)
class ClipReward:
  """reward=clip."""

  model: str = ''  # directory of a CLIPModel in the Hugging Face layout


@dataclasses.dataclass(frozen=True)
class ExternalReward:
  """reward=external: the source of each task's rewards, 'module:function' or 'http://...'.

  '' is none. $VARIABLES are expanded at each request, so a server may move.
  """

  generation: str = ''
  understanding: str = ''


@dataclasses.dataclass(frozen=True)
class Method:
  """What the model learns, and from what. Rewards and log-probabilities are in nats per token.

  Keys that matter only for one choice are in the group of that choice.
  """

  objective: str = 'simpo'  # eq. 5; the full list is `losses.OBJECTIVES`
  task: str = 'unified'  # both tasks in every step; or only 'generation' or 'understanding'
  # 'unified': one model. 'separate': a generator and an understander learn in turns, and each
  # scores the other.
  strategy: str = 'unified'
  separate: Separate = Separate()
  # eq. 3; the full list is `rewards.table.REWARDS`; or a weighted sum such as 'dual+0.3*clip'
  reward: str = 'dual'
  # Eq. 3. 'policy': the current model, or with 'separate' the other one. 'frozen': the initial
  # model. 'ema': a running mean of the trained parameters.
  scorer: str = 'policy'
  ema_decay: float = 0.99
  judge_accuracy: float = 1.0  # for the rewards of the judge: other verdicts are flipped
  clip_reward: ClipReward = ClipReward()
  external_reward: ExternalReward = ExternalReward()
  # for the reward 'vqa'; {} stands for the text
  yes_question: str = 'Does this image show {}? Answer yes or no.'
  group_size: int = 8  # candidates per input
  inputs_per_step: int = 128  # prompts plus images; in 'unified', half of each
  # equal parts of a step's inputs, sampled and differentiated one by one before a single update
  accumulate: int = 1
  steps: int = 438  # 5 epochs of 5,600 prompts and 5,600 images
  beta: float = 2.0
  gamma: float = 0.5
  # weights of an image's codes in the loss; 'equal' is the paper's, `credit` explains the others
  credit: str = 'equal'
  # updates per batch of samples; more than 1 only for objectives that support off-policy updates
  inner_updates: int = 1
  grpo: Grpo = Grpo()
  gspo: Gspo = Gspo()
  cispo: Cispo = Cispo()
  dpo: Dpo = Dpo()
  # weight of the KL to the initial model, for objectives on whole groups; 0: no KL, and no copy of
  # that model
  kl: float = 0.04
  kl_estimator: str = 'k3'
  min_margin: float = 0.0  # the loss drops pairs whose rewards differ by no more than this
  temperature: float = 1.0  # for sampling, and for every log-probability in the loss
  guidance: float = 5.0  # classifier-free guidance for sampling images; 1: off. Never in rewards
  # guide only the first codes of an image, this many; the others cost half. 0: guide all
  cfg_interval: int = 0
  # whether the loss uses the guided mixture that sampled instead of the plain conditional
  policy_guidance: bool = False
  # For models that draw by unmasking (Show-o), whose likelihood of an image is an estimate.
  # 'one_step': mask all codes and score them at once. 'elbo': the masked-diffusion bound
  picture_likelihood: str = 'one_step'
  elbo_draws: int = 1  # random maskings that the bound averages
  # share of a prompt's tokens that the loss drops at random; -1: the family's default. Never in
  # rewards
  prompt_drop: float = -1.0
  # 'delete' dropped tokens, 'hide' them from attention, or replace them with the 'mask' token
  prompt_drop_way: str = 'delete'
  sampling_steps: int = -1  # per image, for models that draw by unmasking; -1: the model's own
  # noise in the choice of codes to keep, at the first step; -1: the model's own
  sampling_noise: float = -1.0
  max_text_tokens: int = 256
  # the words that frame prompts and questions. Janus: 'tokens' (<|User|>) or 'plain' (User).
  # Show-o: 'demo' or 'tuned'. '': the model's own, which the run then saves by name
  template: str = ''
  eos_in_reward: bool = False  # whether R_G counts the end-of-text token of the prompt
  question: str = 'Describe this image in detail.'  # the question that the sampled texts answer
  # precedes the prompt in R_G; '' is none
  instruction: str = 'Describe this image in detail.'
  # 'crop': the center square of an image. 'pad': pad it to a square. Applies to the vision tower
  # and the VQ encoder
  crop: str = 'crop'
  # 'lora': adapters on the projections of the language model
  trainable: str = 'language_model+gen_head'
  lora: Lora = Lora()
  learning_rate: float = 3e-6  # for full weights; adapters use lora.learning_rate
  warmup_steps: int = 5  # then cosine decay to 0 at the last step
  adam_b1: float = 0.9
  adam_b2: float = 0.999
  weight_decay: float = 0.0
  clip: float = 1.0  # maximum global norm of the gradient (max_grad_norm)
  seed: int = 0

  @property
  def peak_learning_rate(self) -> float:
    """The peak learning rate of the trained parameters."""
    return self.lora.learning_rate if self.trainable == 'lora' else self.learning_rate

  @property
  def learning_rate_key(self) -> str:
    """The key that sets the peak learning rate."""
    return 'method.lora.learning_rate' if self.trainable == 'lora' else 'method.learning_rate'

  @property
  def tasks(self):
    """The tasks of a step, as a tuple."""
    return ('generation', 'understanding') if self.task == 'unified' else (self.task,)

  @property
  def inputs_per_task(self):
    """B: prompts in a step's generation half, and images in its understanding half."""
    return self.inputs_per_step // (1 if self.strategy == 'separate' else len(self.tasks))

  def external_source(self, task) -> str:
    """The source of a task's external rewards; '' for none."""
    asked = self.external_reward
    return asked.generation if task == 'generation' else asked.understanding

  def role_at(self, step):
    """The role that learns in step `step` (from 0) of 'separate', the generator first; None with
    one model.
    """
    if self.strategy != 'separate':
      return None
    return tuple(ROLES)[step // self.separate.swap_every % 2]

  def tasks_at(self, step):
    """The tasks of step `step` (from 0), as a tuple."""
    return (ROLES[self.role_at(step)],) if self.strategy == 'separate' else self.tasks


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; one axis may be -1: the remaining devices."""

  data: int = 1
  fsdp: int = -1
  tp: int = 1


@dataclasses.dataclass(frozen=True)
class System:
  """How the run computes, logs and saves. These keys change the results only by rounding."""

  mesh: Mesh = Mesh()
  # devices that a CPU is divided into, so that its cores work side by side on small chunks; 0: one
  # per core, as far as the inputs divide evenly. 1: the CPU is one device
  cpu_devices: int = 1
  rollout_chunk: int = 0  # inputs sampled and scored at once; 0: all inputs of a part (accumulate)
  update_chunk: int = 0  # inputs differentiated at once; 0: all inputs of a part
  remat: bool = True  # recompute each layer in the backward pass
  compute_dtype: str = 'bfloat16'
  # dtype of the candidates' KV cache: '' is compute_dtype; 'int8' has no GPU kernel in this project
  cache_dtype: str = ''
  logprob_chunk: int = 128  # positions whose logits are held at once; 0: all
  # tokens decoded before the KV cache grows; a larger value gives a smaller program that reads more
  # unfilled positions
  decode_segment: int = 16
  # scan over the layers in decoding, for large models on TPUs; other devices would copy each layer
  # at each token
  decode_scan: bool = False
  # gs://BUCKET/FOLDER, or a folder that all processes share, for checkpoints and copies of the
  # workdir's files
  bucket: str = ''
  compile_cache: str = ''  # folder of compiled programs, for a faster next start; '' is none
  log_every: int = 10  # steps between fetches of metrics; every step still gets its own line
  # steps between scores by the frozen initial model; 0: never, which frees its copy
  frozen_every: int = 10
  # steps between scores of swapped prompts and coarse images, one forward pass each; 0: never
  probe_every: int = 0
  samples_every: int = 50  # steps between sheets and rows of all candidates; 0: never
  eval_every: int = 100  # steps between evaluations; 0: only before and after
  save_every: int = 50  # steps between checkpoints; the last step always saves one
  keep_last: int = 2  # checkpoints to keep
  keep_every: int = 0  # also keep every checkpoint at a multiple of this step; 0: none
  external_seconds: float = 60.0  # time limit for an answer of reward=external
  external_retries: int = 2  # retries of a request to an 'http://...' that does not answer
  track: str = ''  # 'wandb': also log metrics and images to Weights & Biases; '': do not


@dataclasses.dataclass(frozen=True)
class Data:
  """Where inputs come from."""

  # 'scenes', 't2i_compbench', or a file with one prompt per line; or a mixture with optional
  # counts: 't2i_compbench:1000+mine.txt'
  prompts: str = 'scenes'
  # 'scenes', a prepared set ('coco', 'journeydb'), or a folder; or 'coco:2800+journeydb:2800'
  images: str = 'scenes'
  data_dir: str = '~/tensorflow_datasets'  # folder of prepared sets; may be gs://BUCKET/FOLDER
  seed: int = 0  # selects the inputs if a mixture gives a count
  # images that do not decode: 'error' lists them all and stops, 'skip' omits and counts them
  bad_images: str = 'error'
  max_prompt_tokens: int = 64  # a longer prompt is an error; prompts are never truncated


@dataclasses.dataclass(frozen=True)
class Eval:
  """The fixed lists for evaluating both tasks, at the run's temperature and guidance."""

  # 'scenes': judged images, descriptions and questions of Scenes. 'own': the fixed lists below,
  # from the run's own data, held out from training. 'auto': 'scenes' if prompts and images are
  # 'scenes', else 'own'. 'none': do not evaluate
  benchmark: str = 'auto'
  prompts_per_task: int = 100  # before and after training
  images_per_prompt: int = 4
  pictures: int = 1000  # to describe before and after training
  quick_prompts_per_task: int = 16  # during training
  quick_pictures: int = 64  # during training
  chunk: int = 50  # prompts or images at once
  # number of prompts to draw, and of images to describe, at every evaluation with the same keys;
  # the initial model scores the results; 0: none
  watched: int = 24
  # 'own': share of the run's own files that is held out for evaluation and replaces the list of
  # `watched`: at least 4, at most 64 and at most half of them; 0: train on all
  held_out: float = 0.1
  # also evaluate the initial model at these two values, its best on validation; -1: do not
  tuned_temperature: float = -1.0
  tuned_guidance: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: str = 'scenes'  # 'scenes': the embedded model; or a directory in the Hugging Face layout
  method: Method = Method()
  system: System = System()
  data: Data = Data()
  eval: Eval = Eval()


def defaults():
  """All keys with their defaults, as an unlocked ConfigDict that a config file changes."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))
