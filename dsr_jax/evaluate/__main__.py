"""Both tasks measured on the fixed lists of Scenes: pictures judged, descriptions and yes/no
answers parsed.

  python -m dsr_jax.evaluate --config=configs/scenes.py --model=runs/scenes
  --benchmarks=geneval,pope --output=out

Writes out/results.json and out/results.md (every score with its 95 % interval) and sheets of
pictures and texts drawn with common seeds. With --before=MODEL2 that model is measured too and
every difference is paired. `Evaluator` is what a run watches itself by.

Seeds are common: candidate i of a list has the same key for every model and step, so differences
  are paired.
Axes: P prompts, S samples a prompt, K candidates of a sample (best of K), C inputs of a chunk, T
  text tokens, N image codes.
"""

import functools
import json
import os

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from dsr_jax import cli as commands
from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError, run_main
from dsr_jax.evaluate import scores as evaluation
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys
from dsr_jax.reporting import sheets as pictures_lib
from dsr_jax.rewards import base as rewards_lib
from dsr_jax.scenes import grammar, sets, world

QUESTION_TOKENS = 32
ANSWER_TOKENS = 6


# Compiled once for all models of one structure: two that are compared share their programs.


@functools.partial(jax.jit, static_argnames=('graphdef', 'samples', 'how', 'best_of'))
def _draw(graphdef, params, prompt, first, seed, instruction, samples, how, best_of):
  model = nnx.merge(graphdef, params)
  number = samples * best_of
  keys = row_keys(jax.random.key(seed), first * number, prompt.ids.shape[0], number)
  codes, _ = model.sample_pictures(prompt, keys, how)
  pictures = model.picture_from_codes(codes)
  if best_of == 1:
    return pictures.pixels
  rewards, _ = rewards_lib.generation(model, pictures, prompt, instruction, Scoring(), keys=keys)
  return _best(pictures.pixels, rewards.reshape(-1, samples, best_of))


@functools.partial(jax.jit, static_argnames=('graphdef', 'eos_id', 'how', 'best_of'))
def _tell(graphdef, eos_id, params, pixels, question, first, seed, how, best_of):
  model = nnx.merge(graphdef, params)
  keys = row_keys(jax.random.key(seed), first * best_of, pixels.shape[0], best_of)
  picture = Picture(None, pixels.astype(jnp.float32) / 127.5 - 1.0)
  texts, _ = model.sample_texts(picture, question, keys, how)
  if best_of == 1:
    return texts
  codes = model.picture_from_pixels(picture.pixels).codes
  rewards, _ = rewards_lib.understanding(model, codes, texts, Scoring(), eos_id=eos_id, keys=keys)
  return Text(*(_best(x, rewards[:, None]) for x in texts))


def _best(x, rewards):
  """x (C, S K, ...), rewards (C, S, K) -> the best of each K (C, S, ...)."""
  rows, samples, _ = rewards.shape
  x = x.reshape(*rewards.shape, *x.shape[2:])
  return x[jnp.arange(rows)[:, None], jnp.arange(samples), jnp.argmax(rewards, axis=-1)]


class Sampler:
  """Samples from a model for prompts or pictures given as host data, in chunks of one shape.

  instruction: what the model is asked about its pictures where the best of K is chosen by R_G
    (unused otherwise).
  """

  def __init__(
    self,
    graphdef,
    processor,
    *,
    chunk: int,
    max_prompt_tokens: int,
    max_text_tokens: int,
    seed: int,
    instruction: str = '',
  ):
    self._processor, self._chunk, self._instruction = processor, chunk, instruction
    self._prompt_tokens, self._text_tokens, self._seed = max_prompt_tokens, max_text_tokens, seed
    self._draw = functools.partial(_draw, graphdef)
    self._tell = functools.partial(_tell, graphdef, processor.templates.eos_id)

  def pictures(
    self,
    params,
    prompts,
    samples: int,
    temperature: float,
    guidance: float,
    best_of: int = 1,
    seed: int | None = None,
    cfg_interval: int = 0,
  ):
    """P prompts -> (P, S, H, W, 3) uint8; each of the S is the best by R_G of `best_of`
    candidates.
    """
    text = self._processor.pad(
      [self._processor.encode_prompt(p) for p in prompts], self._prompt_tokens
    )
    how = Sampling(temperature=temperature, guidance=guidance, cfg_interval=cfg_interval)
    seed = self._seed if seed is None else seed
    asked = None
    if best_of > 1:
      ids = self._processor.encode_question(self._instruction)
      asked = Text(np.array(ids, np.int32), np.ones(len(ids), bool))

    def run(first, part):
      return processor_lib.to_uint8(
        sharding.fetch(self._draw(params, Text(*part), first, seed, asked, samples, how, best_of))
      )

    return self._chunked(run, tuple(text))

  def texts(
    self,
    params,
    pixels,
    questions,
    temperature: float,
    max_tokens: int | None = None,
    best_of: int = 1,
    seed: int | None = None,
  ):
    """(P, H, W, 3) uint8 and P questions -> P texts, each the best by R_U of `best_of`."""
    question = self._processor.pad(
      [self._processor.encode_question(q) for q in questions], QUESTION_TOKENS
    )
    how = Sampling(temperature=temperature, max_tokens=max_tokens or self._text_tokens)
    seed = self._seed if seed is None else seed

    def run(first, part):
      text = jax.tree.map(
        sharding.fetch, self._tell(params, part[0], Text(*part[1:]), first, seed, how, best_of)
      )
      return np.array(
        [self._processor.decode(ids[mask]) for ids, mask in zip(text.ids[:, 0], text.mask[:, 0])],
        object,
      )

    return list(self._chunked(run, (pixels, *question)))

  def _chunked(self, run, arrays):
    """Applies run(first, part) to parts of `chunk` rows, the last one filled up with copies of its
    first row.
    """
    rows, out = len(arrays[0]), []
    for first in range(0, rows, self._chunk):
      part = tuple(a[first : first + self._chunk] for a in arrays)
      missing = self._chunk - len(part[0])
      filled = tuple(np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) for a in part)
      out.append(run(first, filled)[: len(part[0])])
    return np.concatenate(out)


class Evaluator:
  """Evaluates a run's model before, during (on the beginnings of the same lists) and after."""

  def __init__(self, config, processor, graphdef, split: str = 'evaluation'):
    e, m = config.eval, config.method
    self._eval, self._method, self._split = e, m, split
    self._sampler = Sampler(
      graphdef,
      processor,
      chunk=e.chunk,
      max_prompt_tokens=config.data.max_prompt_tokens,
      max_text_tokens=m.max_text_tokens,
      seed=e.seed,
    )
    self._last = m.steps

  def run(self, params, step: int, reader=None):
    """Evaluates parameters of all parts: the whole lists at the first and last step, their
    beginnings between.

    reader: the parameters that describe and answer, where they are another model's than those that
      draw.
    Returns flat scores (generation/..., description/..., yesno/...) and details: {name: rows of
    sums}, for `dsr_jax.effect`.
    """
    whole = step in (0, self._last)
    per_task, pictures = (
      (self._eval.prompts_per_task, self._eval.pictures)
      if whole
      else (self._eval.quick_prompts_per_task, self._eval.quick_pictures)
    )
    scores, details = self.generation(
      params,
      per_task,
      self._method.temperature,
      self._method.guidance,
      cfg_interval=self._method.cfg_interval,
    )
    if step == 0 and self._eval.tuned_temperature >= 0:
      tuned, tuned_details = self.generation(
        params, per_task, self._eval.tuned_temperature, self._eval.tuned_guidance
      )
      scores['generation/tuned'] = tuned['generation/mean']
      details['generation_tuned'] = tuned_details['generation']
    understood, understood_details = self.understanding(
      params if reader is None else reader, pictures
    )
    return {**scores, **understood}, {**details, **understood_details}

  def generation(
    self, params, per_task: int, temperature: float, guidance: float, cfg_interval: int = 0
  ):
    """GenEval's six tasks, their plain mean with its 95 % interval, and the share of prompts with
    any right sample.
    """
    prompts = sets.evaluation_prompts(per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._eval.images_per_prompt,
      temperature,
      guidance,
      cfg_interval=cfg_interval,
    )
    scores = evaluation.generation_scores(prompts, pixels)
    flat = {f'generation/{task}': estimate.value for task, estimate in scores['tasks'].items()}
    flat = {
      **_with_interval('generation/mean', scores['mean']),
      'generation/any': scores['any'].value,
      'generation/strict': scores['strict'].value,
      **flat,
    }
    return flat, {'generation': scores['correct'].astype(int).tolist()}

  def understanding(self, params, pictures: int):
    """Descriptions, sampled at the run's temperature and greedy, and POPE-style yes/no questions,
    greedy.
    """
    scenes = sets.evaluation_scenes(pictures, self._split)
    pixels = sets.pictures(scenes)
    out, details = {}, {}
    for name, temperature in (
      ('description', self._method.temperature),
      ('description_greedy', 0.0),
    ):
      texts = self._sampler.texts(
        params, pixels, [grammar.QUESTION_DESCRIBE] * len(scenes), temperature
      )
      scores = evaluation.description_scores(scenes, texts)
      for key in ('f1', 'precision', 'recall', 'hallucination', 'unparsable', 'words'):
        out.update(
          _with_interval(f'{name}/{key}', scores[key])
          if key == 'f1'
          else {f'{name}/{key}': scores[key].value}
        )
      details[name] = evaluation.description_sums(scenes, texts).tolist()
    scenes, rows = sets.evaluation_pope(max(pictures // 2, 1), self._split)
    shown = sets.pictures(scenes)[np.array([r.picture for r in rows])]
    answers = self._sampler.texts(params, shown, [r.text for r in rows], 0.0, ANSWER_TOKENS)
    pope = evaluation.pope_scores(rows, answers)
    out.update(_with_interval('yesno/f1', pope['overall']['f1']))
    out.update(
      {
        f'yesno/{track}_f1': scores['f1'].value
        for track, scores in pope.items()
        if track != 'overall'
      }
    )
    out['yesno/accuracy'], out['yesno/yes_ratio'] = (
      pope['overall'][k].value for k in ('accuracy', 'yes_ratio')
    )
    details['yesno'] = evaluation.pope_sums(rows, answers).tolist()
    return out, details


def _with_interval(name: str, estimate) -> dict[str, float]:
  return {name: estimate.value, f'{name}_low': estimate.low, f'{name}_high': estimate.high}


# The command.


def check_benchmarks(names) -> tuple[str, ...]:
  """The benchmarks that are asked for, all of them if none is. InputError lists those that
  exist.
  """
  from dsr_jax.evaluate import benchmarks as evaluate_scenes

  chosen = tuple(dict.fromkeys(name.strip() for name in names if name.strip())) or tuple(
    evaluate_scenes.BENCHMARKS
  )
  for name in chosen:
    if name not in evaluate_scenes.BENCHMARKS:
      raise InputError(
        f'found the benchmark {name!r}; expected some of {", ".join(evaluate_scenes.BENCHMARKS)}; '
        'name those in --benchmarks'
      )
  return chosen


def load(name: str, config, best_of: int = 1):
  """A model as `evaluate_scenes.Subject`: its sampling is the configuration's, whatever the model
  was trained with.
  """
  from dsr_jax.evaluate import benchmarks as evaluate_scenes
  from dsr_jax.models.janus import model as janus

  commands.log(f'loading      {name}')
  bundle = model_source.resolve(name).bundle
  size = bundle.config.image_size
  if size != world.IMAGE_SIZE:
    raise InputError(
      f'found the model {name} of {size} x {size} pixels; expected one of {world.IMAGE_SIZE} x '
      f'{world.IMAGE_SIZE}, as the '
      'benchmarks of Scenes have them; name another --model'
    )
  e, m = config.eval, config.method
  sampler = Sampler(
    janus.graphdef_of(bundle.config),
    bundle.processor,
    chunk=e.chunk,
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_text_tokens=m.max_text_tokens,
    seed=e.seed,
    instruction=m.instruction,
  )
  return evaluate_scenes.Subject(name, jax.device_put(bundle.params), sampler, e, m, best_of)


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  commands.require(config=f.config, model=f.model, output=f.output)
  if f.best_of < 1:
    raise InputError(f'found --best_of={f.best_of}; expected at least 1; raise it')
  names = check_benchmarks(f.benchmarks)
  config = config_lib.from_config_dict(f.config)
  commands.check_output(f.output, _ours)
  from dsr_jax.evaluate import benchmarks as evaluate_scenes

  after = load(f.model, config, f.best_of)
  before = load(f.before, config, f.best_of) if f.before else None
  results = {name: evaluate_scenes.measure(name, after, before) for name in names}
  settings = {
    'temperature': config.method.temperature,
    'guidance': config.method.guidance,
    'cfg_interval': config.method.cfg_interval,
    'best_of': f.best_of,
    'seed': config.eval.seed,
    'prompts_per_task': config.eval.prompts_per_task,
    'images_per_prompt': config.eval.images_per_prompt,
    'pictures': config.eval.pictures,
  }
  about = {'model': f.model, 'before': f.before or None, 'settings': settings}
  subjects = [s for s in (before, after) if s]
  with commands.whole_directory(f.output) as aside:
    _write(
      aside,
      'results.json',
      (json.dumps({**about, 'benchmarks': results}, indent=1, allow_nan=False) + '\n').encode(),
    )
    _write(aside, 'results.md', evaluate_scenes.markdown(about, results).encode())
    _write(aside, 'pictures.png', pictures_lib.png(evaluate_scenes.picture_sheet(subjects)))
    _write(aside, 'texts.png', pictures_lib.png(evaluate_scenes.text_sheet(subjects)))
  commands.log('\n' + evaluate_scenes.markdown(about, results))

  def chief(table):
    return {key: score['value'] for key, score in table['scores'].items()}

  commands.print_json(
    {'output': f.output, **{name: chief(table) for name, table in results.items()}}
  )


def _write(folder, name, data):
  with open(os.path.join(folder, name), 'wb') as f:
    f.write(data)


def _ours(name):
  return name in ('results.json', 'results.md', 'pictures.png', 'texts.png')


def define_flags(f=flags.FLAGS):
  config_flags.DEFINE_config_file(
    'config',
    None,
    'The lists, and how to sample: a file of configs/ (its eval, method.temperature, '
    'method.guidance and method.cfg_interval), keys set by --config.key=value.',
    flag_values=f,
  )
  flags.DEFINE_string('model', None, f'The model: {model_source.EXPECTED}.', flag_values=f)
  flags.DEFINE_string(
    'before',
    '',
    'A model to compare with: measured with the same seeds, differences are paired.',
    flag_values=f,
  )
  flags.DEFINE_list(
    'benchmarks',
    [],
    'Some of geneval, t2i_compbench, descriptions, pope, multiple_choice, hallusion; all by '
    'default.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'best_of',
    1,
    "Every sampled picture or text is the best of so many by the model's own reward.",
    flag_values=f,
  )
  flags.DEFINE_string(
    'output',
    None,
    'Folder to write: new, empty, or an earlier output of this command.',
    flag_values=f,
  )


if __name__ == '__main__':
  define_flags()
  run_main(main, config_lib.check_flags)
