"""The generation half of a step against torch and transformers doing the same work, phase by phase.

  python -m benchmarks.generation --output=docs/benchmark_generation.md
  python -m benchmarks.generation --config=configs/janus_pro_1b.py --rounds=1

The second is for a GPU: random weights, bfloat16.

Both sides have the same weights, prompts, sizes, float32 and cores, and take turns in one process,
so that other load on the machine affects both. The torch side is what a careful user would write:
it runs the unique prompts once and repeats their keys into a static cache, prepares masks and
positions outside the loop, computes logits only where they are read, and uses the fused optimizer.
It is not compiled: `transformers` runs eagerly. With a published model's config, each side has its
own random weights, and both use `system.compute_dtype`; torch then keeps no float32 master weights,
which favors it.

Axes: B prompts, G samples, N image codes, T text tokens, H W pixels.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault(
  'XLA_PYTHON_CLIENT_ALLOCATOR', 'platform'
)  # on a GPU, leaves the memory that JAX does not use to torch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache, JanusForConditionalGeneration, StaticCache
from transformers import JanusConfig as HfJanusConfig

from dsr_jax import chunks, config_loading, convert, files, sharding
from dsr_jax import config as config_lib
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.convert import configs, locate, tokenizer_files
from dsr_jax.data import batches
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Text
from dsr_jax.plan import program as plan_program
from dsr_jax.rewards import dual
from dsr_jax.rollouts import GenerationBatch, GenerationInputs, Half, Rollout
from dsr_jax.runtime import cpu
from dsr_jax.scenes import sets

ROOT = pathlib.Path(__file__).resolve().parent.parent

DECODED_AT_ONCE = 32  # images, in torch
PHASES = ('sampling', 'VQ decode', 'reversed scoring', 'update')


@dataclasses.dataclass(frozen=True)
class Work:
  """The input of both sides: a model directory as `bundle`, the run's `method` and `system`, and
  the arrays of one step.
  """

  directory: str
  bundle: convert.Bundle
  method: config_lib.Method
  system: config_lib.System
  batch: GenerationBatch


class Jax:
  """The step's own functions on the run's mesh, in its chunks; one compiled program per phase."""

  def __init__(self, work: Work):
    config = work.bundle.config
    ctx = step_lib.StepContext(
      graphdef=JANUS.graphdef(config),
      family=JANUS,
      spec=JANUS.spec(config),
      # Pairs, for any objective in the config: the torch side has only SimPO.
      method=dataclasses.replace(work.method, objective='simpo', inner_updates=1),
      system=dataclasses.replace(work.system, frozen_every=0),
    )
    task = ctx.tasks['generation']
    self.mesh = sharding.make_mesh(work.system.mesh)
    self.state = state_lib.init_state(work.bundle.params, JANUS, ctx.method, ctx.system, self.mesh)
    self.batch = jax.tree.map(jnp.asarray, work.batch)

    def policy_of(state):
      return step_lib.rollout_policy(ctx, state, state.params)

    def in_chunks(fn):
      """Jits fn(policy, chunk, *rest) as fn(state, inputs, *rest)."""

      @jax.jit
      def of_all(state, inputs, *rest):
        policy = policy_of(state)
        inputs = jax.tree.map(sharding.split_rows, inputs)
        return chunks.mapped(lambda part: fn(policy, part, *rest), inputs, ctx.rollout_chunk)

      return of_all

    def sample(policy, inputs, seed):
      keys = task.sample_keys(jax.random.key(seed), inputs.place)
      return policy.sample_pictures(inputs.prompt, keys, task.sampling)[0]

    def decode(policy, codes):
      return policy.picture_from_codes(codes)

    def score(policy, pictures_and_inputs):
      pictures, inputs = pictures_and_inputs
      instruction = self.batch.instruction
      return dual.generation(policy, pictures, inputs.prompt, instruction, task.reward_scoring)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, inputs, codes, rewards):
      learners, weight = ctx.objective.choose(rewards, ctx.method)
      half = Half(
        inputs=inputs,
        rollout=Rollout(
          samples=codes,
          sample_logps=jnp.zeros(codes.shape),
          rewards=rewards,
          frozen_rewards=rewards,
          score_keys=None,
          target_codes=None,
          diagnostics={},
        ),
        learners=learners,
        weight=weight,
        pair=learners,
        pair_weight=weight,
        ref_logps=None,
      )
      rate = state_lib.learning_rate(ctx.method, 0)
      params, opt_state, aux, _ = step_lib.inner_update(
        ctx, state, {task.name: half}, rate, state.params, state.opt_state
      )
      state = state.after_update(None, params, opt_state, ctx.method.ema_decay)
      return state, aux[task.name].loss

    self._sample, self._decode, self._score = map(in_chunks, (sample, decode, score))
    self._update = update

  @property
  def inputs(self) -> GenerationInputs:
    """The prompts, in the form that a task uses."""
    index = jnp.arange(self.batch.prompt.ids.shape[0])
    return GenerationInputs(self.batch.prompt, index, {})

  def sampling(self, seed):
    """Codes (B, G, N)."""
    with jax.set_mesh(self.mesh):
      return np.asarray(self._sample(self.state, self.inputs, seed))

  def decoding(self, codes):
    """Codes (B, G, N) -> `Picture` with axes (B, G, ...)."""
    with jax.set_mesh(self.mesh):
      return jax.block_until_ready(self._decode(self.state, codes))

  def scoring(self, pictures):
    """Rewards (B, G)."""
    with jax.set_mesh(self.mesh):
      return np.asarray(self._score(self.state, (pictures, self.inputs)))

  def update(self, codes, rewards):
    """One update; returns its loss."""
    with jax.set_mesh(self.mesh):
      self.state, loss = self._update(self.state, self.inputs, codes, rewards)
      return float(loss)


class Torch:
  """The same work with `transformers.JanusForConditionalGeneration`."""

  def __init__(self, work: Work):
    self.method = work.method
    self.templates = work.bundle.config.templates
    self.codes_count = work.bundle.config.num_codes
    dtype = getattr(torch, work.system.compute_dtype)
    if work.directory:
      self.model = JanusForConditionalGeneration.from_pretrained(work.directory, dtype=dtype).eval()
    else:
      torch.set_default_dtype(dtype)
      self.model = JanusForConditionalGeneration(
        HfJanusConfig(**configs.to_json(work.bundle.config, work.system.compute_dtype))
      ).eval()
      torch.set_default_dtype(torch.float32)
    trained = (
      self.model.model.language_model,
      self.model.lm_head,
      self.model.model.generation_head,
    )
    self.model.requires_grad_(False)
    for part in trained:
      part.requires_grad_(True)
    self.trained = [p for part in trained for p in part.parameters()]
    m = work.method
    self.optimizer = torch.optim.AdamW(
      self.trained,
      lr=m.learning_rate,
      betas=(m.adam_b1, m.adam_b2),
      weight_decay=m.weight_decay,
      fused=True,
    )
    prompt, instruction = work.batch.prompt, work.batch.instruction
    self.content = [ids[mask].tolist() for ids, mask in zip(prompt.ids, prompt.mask)]
    self.instruction = instruction.ids[instruction.mask].tolist()

  def prompt_rows(self):
    """Left-padded generation prompts: ids (B, P), mask (B, P) bool."""
    t = self.templates
    rows = [[*t.generation_prefix, *c, *t.generation_suffix] for c in self.content]
    longest = max(map(len, rows))
    ids = torch.tensor([[t.pad_id] * (longest - len(r)) + r for r in rows])
    return ids, torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])

  @torch.inference_mode()
  def sampling(self, seed):
    torch.manual_seed(seed)
    lm, group, t = self.model.model.language_model, self.method.group_size, self.templates
    ids, mask = self.prompt_rows()
    blank = torch.where(mask & (ids != t.bos_id) & (ids != t.boi_id), t.pad_id, ids)
    ids, mask = torch.cat([ids, blank]), mask.repeat(2, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = DynamicCache(config=lm.config)
    hidden = lm(
      inputs_embeds=lm.embed_tokens(ids),
      attention_mask=mask,
      position_ids=positions,
      past_key_values=prompt,
    ).last_hidden_state
    length, last = ids.shape[1], self.codes_count - 1
    cache = StaticCache(config=lm.config, max_cache_len=length + last)
    for i, layer in enumerate(prompt.layers):
      cache.update(
        layer.keys.repeat_interleave(group, 0), layer.values.repeat_interleave(group, 0), i
      )
    hidden = hidden[:, -1].repeat_interleave(group, 0)
    position = (positions[:, -1:] + 1).repeat_interleave(group, 0)
    seen = torch.cat(
      [mask.repeat_interleave(group, 0), torch.zeros(len(hidden), last, dtype=torch.bool)], 1
    )[:, None, None]
    out = torch.empty(len(hidden) // 2, self.codes_count, dtype=torch.long)
    for n in range(self.codes_count):
      cond, uncond = self.model.model.generation_head(hidden).chunk(2)
      logits = uncond + self.method.guidance * (cond - uncond)
      out[:, n : n + 1] = torch.multinomial(torch.softmax(logits / self.method.temperature, -1), 1)
      if n == last:
        break
      embeds = self.model.prepare_embeddings_for_image_generation(out[:, n : n + 1]).repeat(2, 1, 1)
      seen[..., length + n] = True
      hidden = lm(
        inputs_embeds=embeds, attention_mask=seen, position_ids=position, past_key_values=cache
      ).last_hidden_state[:, -1]
      position = position + 1
    return out.reshape(-1, group, self.codes_count).cpu().numpy()

  @torch.inference_mode()
  def decoding(self, codes):
    parts = torch.tensor(codes).long().flatten(0, 1).split(DECODED_AT_ONCE)
    out = torch.cat(
      [self.model.decode_image_tokens(part).clamp(-1, 1) for part in parts]
    )  # (B G, H, W, 3)
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    return out

  @torch.inference_mode()
  def scoring(self, pixels):
    t, group = self.templates, self.method.group_size
    features = self.model.model.get_image_features(
      pixels.permute(0, 3, 1, 2).to(self.model.dtype)
    ).pooler_output
    longest = max(map(len, self.content))
    tail = [
      [
        *t.understanding_infix,
        *self.instruction,
        *t.understanding_suffix,
        *c,
        *[t.pad_id] * (longest - len(c)),
      ]
      for c in self.content
    ]
    embed = self.model.get_input_embeddings()
    head = embed(torch.tensor(t.understanding_prefix)).expand(len(features), -1, -1)
    ids = torch.tensor(tail).repeat_interleave(group, 0)
    # Padding is on the right, where it is never seen by causality, so no mask is needed.
    states = self.model.model.language_model(
      inputs_embeds=torch.cat([head, features, embed(ids)], 1), use_cache=False
    ).last_hidden_state[:, -longest - 1 : -1]
    logits = self.model.lm_head(states)
    logits[..., list(t.forbidden_text_ids)] = -torch.inf
    logp = torch.log_softmax(logits, -1).gather(-1, ids[:, -longest:, None])[..., 0]
    length = torch.tensor([len(c) for c in self.content]).repeat_interleave(group)
    own = torch.arange(longest) < length[:, None]
    return (torch.where(own, logp, 0.0).sum(1) / length).float().reshape(-1, group).cpu().numpy()

  def update(self, codes, reward):
    codes, reward = torch.tensor(codes).long(), torch.tensor(reward)
    pair = torch.stack([reward.argmax(1), reward.argmin(1)], 1)
    chosen = codes.gather(1, pair[..., None].expand(-1, -1, codes.shape[-1])).flatten(0, 1)
    ids, mask = (x.repeat_interleave(2, 0) for x in self.prompt_rows())
    lm = self.model.model.language_model
    embeds = torch.cat(
      [lm.embed_tokens(ids), self.model.prepare_embeddings_for_image_generation(chosen[:, :-1])], 1
    )
    mask = torch.cat(
      [mask, torch.ones(len(mask), embeds.shape[1] - mask.shape[1], dtype=torch.bool)], 1
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = lm(
      inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = (
      self.model.model.generation_head(hidden[:, ids.shape[1] - 1 :]) / self.method.temperature
    )
    mean = (
      torch.log_softmax(logits, -1).gather(-1, chosen[..., None])[..., 0].mean(1).reshape(-1, 2)
    )
    margin = self.method.beta * (mean[:, 0] - mean[:, 1]) - self.method.gamma
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, self.method.clip)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.item()


# Counting.


def flops(config: JanusConfig, batch, method) -> dict[str, float]:
  """FLOPs of the matrix products and convolutions that each phase needs, two per multiply-add,
  without norms, softmax and elementwise operations.

  Counts only the necessary work: a prompt once, causal attention as half, logits only where they
  are read. Either side may do more.
  """
  text, vision, vq = config.text, config.vision, config.vq
  t = config.templates
  d, inner, n = text.hidden_size, text.num_attention_heads * text.head_dim, config.num_codes
  token = text.num_hidden_layers * (
    4 * d * inner + 3 * d * text.intermediate_size
  )  # weights that a token passes in the layers

  def attend(queries, keys):
    return text.num_hidden_layers * 2 * inner * queries * keys  # scores and weighted sum

  def causal(length, before=0):
    return attend(length, before + (length + 1) / 2)

  lengths = batch.prompt.mask.sum(1)
  prompts = [len(t.generation_prefix) + int(x) + len(t.generation_suffix) for x in lengths]
  group = method.group_size
  head = d * d + d * vq.num_embeddings
  code = vq.embed_dim * d + d * d  # a code's embedding

  def draw(rows, p):
    return (p - 1) * token + causal(p - 1) + rows * (n * (token + head) + causal(n, p - 1))

  sampling = sum(2 * draw(group, p) + group * (n - 1) * code for p in prompts)

  w, patches = vision.hidden_size, vision.num_patches
  tower = patches * (3 * vision.patch_size**2 * w + w * d + d * d)
  tower += vision.num_hidden_layers * (
    patches * (4 * w * w + 2 * w * vision.intermediate_size) + 2 * w * patches**2
  )
  frame = (
    len(t.understanding_prefix)
    + patches
    + len(t.understanding_infix)
    + len(batch.instruction.ids)
    + len(t.understanding_suffix)
  )

  def read(x):
    return (frame + x - 1) * token + causal(frame + x - 1) + x * d * text.vocab_size

  scoring = sum(group * (tower + read(int(x))) for x in lengths)

  # Forward; the backward pass adds two for every product with a trained weight or an activation.
  forward = sum(
    (p - 1) * token + causal(p - 1) + 2 * (n * (token + head) + causal(n, p - 1)) for p in prompts
  )
  decode = len(prompts) * group * vq_decoder_products(config)
  update = 3 * forward + len(prompts) * 2 * (n - 1) * code
  return dict(zip(PHASES, (2.0 * x for x in (sampling, decode, scoring, update))))


def vq_decoder_products(config: JanusConfig) -> float:
  """Multiply-adds of one image in the VQ decoder."""
  vq, side = config.vq, config.grid
  widths = [vq.base_channels * m for m in reversed(vq.channel_multiplier)]

  def block(i, o, pixels):
    return pixels * (9 * i * o + 9 * o * o + (i * o if i != o else 0))

  def attention(c, pixels):
    return pixels * 4 * c * c + 2 * c * pixels**2

  pixels = side * side
  total = pixels * (vq.embed_dim * vq.latent_channels + 9 * vq.latent_channels * widths[0])
  total += 2 * block(widths[0], widths[0], pixels) + attention(widths[0], pixels)
  for level, (i, o) in enumerate(zip([widths[0]] + widths[:-1], widths)):
    for b in range(vq.num_res_blocks + 1):
      total += block(i if b == 0 else o, o, pixels)
      total += attention(o, pixels) if level == 0 else 0
    if level < len(widths) - 1:
      pixels *= 4
      total += pixels * 9 * o * o
  return total + pixels * 9 * widths[-1] * 3


# Measuring.


def seconds(fn, *args):
  start = time.perf_counter()
  out = fn(*args)
  return time.perf_counter() - start, out


def matmul_rate(dtype: str, repeats: int = 3, size: int = 4096) -> float:
  """FLOP/s of a matrix product in JAX, the best of a few."""
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  return (
    2 * size**3 / min(seconds(lambda: product(x).block_until_ready())[0] for _ in range(repeats))
  )


def check_same(ours: Jax, theirs: Torch) -> dict[str, float]:
  """Largest differences of the two sides on the same codes; raises if their work differs."""
  codes = ours.sampling(0)
  picture, pixels = ours.decoding(codes), theirs.decoding(codes)
  reward, other = ours.scoring(picture), theirs.scoring(pixels)
  gaps = dict(
    pixels=np.abs(np.asarray(picture.pixels).reshape(pixels.shape) - pixels.numpy()).max(),
    rewards=np.abs(reward - other).max(),
    loss=abs(ours.update(codes, reward) - theirs.update(codes, reward)),
  )
  assert all(gap < 1e-3 for gap in gaps.values()), gaps
  assert theirs.sampling(0).shape == codes.shape
  return {k: float(v) for k, v in gaps.items()}


def one_round(side, seed):
  """Seconds of each phase of one generation half."""
  took = [None] * 4
  took[0], codes = seconds(side.sampling, seed)
  took[1], pictures = seconds(side.decoding, codes)
  took[2], reward = seconds(side.scoring, pictures)
  took[3], _ = seconds(side.update, codes, reward)
  if torch.cuda.is_available():
    torch.cuda.empty_cache()  # leaves the memory that torch does not use to JAX
  print(
    f'{type(side).__name__:<6}' + ', '.join(f'{name} {s:.3f} s' for name, s in zip(PHASES, took)),
    file=sys.stderr,
  )
  return took


def measure(ours: Jax, theirs: Torch, rounds: int, limit: float):
  """Alternating rounds, for at most `limit` seconds: times (rounds, 2, phases), JAX first."""
  times, start = [], time.monotonic()
  for i in range(rounds):
    sides = (ours, theirs) if i % 2 == 0 else (theirs, ours)
    pair = [one_round(side, i) for side in sides]
    times.append(pair if i % 2 == 0 else pair[::-1])
    if time.monotonic() - start > limit:
      break
  return np.array(times)


def table(times, work, rate) -> str:
  """Markdown: medians, medians of the rounds' ratios, and the share of the matmul rate that each
  side reaches.
  """
  times = np.concatenate([times, times.sum(-1, keepdims=True)], axis=-1)
  counted = flops(work.bundle.config, work.batch, work.method)
  counted = [*counted.values(), sum(counted.values())]
  lines = [
    '| phase | JAX, s | torch, s | torch / JAX | GFLOP | JAX, of the matmul rate | torch |',
    '|---|---|---|---|---|---|---|',
  ]
  for i, name in enumerate((*PHASES, '**total**')):
    ours, theirs = (statistics.median(times[:, side, i]) for side in (0, 1))
    ratio = statistics.median(times[:, 1, i] / times[:, 0, i])
    share = [f'{100 * counted[i] / took / rate:.0f} %' for took in (ours, theirs)]
    lines.append(
      f'| {name} | {ours:.3f} | {theirs:.3f} | {ratio:.2f} | {counted[i] / 1e9:.1f} | {share[0]} | '
      f'{share[1]} |'
    )
  return '\n'.join(lines)


def device_name() -> str:
  device = jax.devices()[0]
  return (
    f'{processor_name()}, {os.cpu_count()} cores'
    if device.platform == 'cpu'
    else device.device_kind
  )


def processor_name() -> str:
  for line in open('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else ():
    if line.startswith('model name'):
      return line.partition(':')[2].strip()
  return platform.processor()


def page(times, work, rate, gaps, command, model) -> str:
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'flax', 'torch', 'transformers')
  )
  method = work.method
  shape = (
    f'{method.inputs_per_task} prompts x {method.group_size} candidates, guidance '
    f'{method.guidance:g}'
  )
  same = (
    '- The same numbers come out: for the same codes pixels differ by at most {pixels:.0e}, '
    'rewards by {rewards:.0e}, the loss\n'
    '  by {loss:.0e}.'.format(**gaps)
    if gaps
    else '- Weights are random, of each side its own.'
  )
  return f"""# The generation half of a step against torch

{table(times, work, rate)}

Medians of {len(times)} rounds in which the two sides took turns; the ratio is the median of the rounds' ratios.

- Work: {shape}, {work.bundle.config.num_codes} codes a picture, {work.system.compute_dtype}, weights of {model}.
{same}
- FLOPs are those the work needs, counted from the shapes (two for a multiply-add; a prompt once, causal attention half, no padding).
- Matmul rate: {rate / 1e9:.0f} GFLOP/s, a large product in JAX in the same type and run.
- Device: {device_name()}; load average {os.getloadavg()[0]:.1f} at the end.
- Date: {datetime.date.today()}. {versions}.
- Command: `{command}`
"""  # noqa: E501


def prepare_published(config) -> Work:
  """A published model's sizes, random weights, 16 prompts of 8 to 24 tokens; downloads nothing."""
  model = plan_program.sizes_of(config.model)
  model = dataclasses.replace(model, templates=plan_program.stand_in_templates(model))
  method = dataclasses.replace(config.method, inputs_per_step=32)
  params = plan_program.random_arrays(janus.abstract_params(model))
  rng = np.random.default_rng(0)
  lengths = rng.integers(8, 25, method.inputs_per_task)

  def text(rows):
    return rng.integers(9, model.text.vocab_size - 1, (rows, 24)).astype(np.int32)

  batch = GenerationBatch(
    prompt=Text(text(len(lengths)), np.arange(24) < lengths[:, None]),
    instruction=Text(text(1)[0, :8], np.ones(8, bool)),
    extra={},
  )
  return Work('', convert.Bundle(model, params, None, {}), method, config.system, batch)


def prepare(directory: str, config, scratch: str) -> Work:
  """The default step's sizes and its first batch; random weights if there is no embedded model."""
  if not directory:
    directory, words = os.path.join(scratch, 'model'), os.path.join(scratch, 'words')
    processor = tokenizer_files.make_tokenizer(sets.vocabulary_texts(2000, 0), 640, words)
    model = dataclasses.replace(JanusConfig.scenes(), templates=processor.templates)
    params = janus.create(model, 0)[1]
    params['language_model']['embed_tokens']['embedding'] *= 20  # as large as in a trained model
    convert.save(directory, model, jax.tree.map(np.asarray, params), words)
  bundle = convert.load(directory)
  made = batches.make(config.data, config.method, bundle.processor, bundle.config.image_size)
  return Work(directory, bundle, config.method, config.system, made.at(0).generation)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument(
    '--model',
    default=locate.EMBEDDED if os.path.isdir(locate.EMBEDDED) else '',
    help='model directory; random weights of the same sizes if the embedded one is absent',
  )
  parser.add_argument('--config', default=str(ROOT / 'configs' / 'scenes.py'))
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--seconds', type=float, default=90, help='no round starts later')
  parser.add_argument('--threads', type=int, default=2, help="torch's threads; JAX uses all cores")
  parser.add_argument('--output', default='', help='Markdown file; stdout always has the table')
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  torch.set_default_device('cuda' if torch.cuda.is_available() else 'cpu')
  with tempfile.TemporaryDirectory() as scratch:
    config = cpu.divide(config_loading.load(args.config))
    work = (
      prepare(args.model, config, scratch)
      if config.model == 'scenes'
      else prepare_published(config)
    )
    print('compiling', file=sys.stderr)
    ours, theirs = Jax(work), Torch(work)
    gaps = {}
    if work.directory:
      gaps = check_same(ours, theirs)
      print(f'same on both sides: {gaps}', file=sys.stderr)
    else:
      one_round(ours, 0)  # compiles
    times = measure(ours, theirs, args.rounds, args.seconds)
    rate = matmul_rate(
      work.system.compute_dtype, size=4096 if jax.default_backend() == 'cpu' else 8192
    )
    command = ' '.join(['python -m benchmarks.generation', *sys.argv[1:]])
    text = page(
      times,
      work,
      rate,
      gaps,
      command,
      'the embedded model' if work.directory == args.model else 'random models of these sizes',
    )
  print(text)
  if args.output:
    files.write_text(args.output, text)


if __name__ == '__main__':
  main()
