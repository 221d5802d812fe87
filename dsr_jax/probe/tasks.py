"""The probe's measurements of each task: combines samples, rewards, judgments and words into
numbers and the values of the page.

Axes: P inputs, G samples, M other images, T text tokens, N image codes.
"""

import dataclasses

import numpy as np

from dsr_jax import cli
from dsr_jax.data import batches as batches_lib
from dsr_jax.evaluate import ranking, stats
from dsr_jax.probe import measures, words
from dsr_jax.probe import scenes as scenes_lib
from dsr_jax.probe.model import ProbedTexts, Prober
from dsr_jax.rollouts import GenerationBatch, UnderstandingBatch

INSTRUCTIONS = (
  'Describe this image in detail.',
  'What is in the picture?',
  'Write a caption for this image.',
)
OTHERS = 8  # images of other prompts that represent "no image"
SWAPS = 64  # true pairs of each kind
SHOWN = 4  # inputs of each task on the page


@dataclasses.dataclass
class Result:
  """A task's numbers for probe.json, and its values for the page."""

  numbers: dict
  shown: dict


def probe(model, config, number: int, seed: int) -> dict[str, Result]:
  """Measures `number` prompts and as many images: a Result for each of the config's tasks.

  model: `families.Model`. Raises InputError if prompts or images do not suit the model.
  """
  m = config.method
  # Both tasks at once, whichever would train first; the run's own reward is not needed here.
  inputs = dataclasses.replace(
    m, strategy='unified', reward='dual', inputs_per_step=number * len(m.tasks), accumulate=1
  )
  batches = batches_lib.make(config.data, inputs, model.processor, model.spec.image_size)
  batch = batches.at(0)
  prober = Prober(model, m, config.system, seed)
  out = {}
  if batch.generation is not None:
    cli.log(f'drawing      {m.group_size} images for each of {number} prompts')
    texts = batches.texts_at(0)
    out['generation'] = generation(
      prober, model.processor, config, batch.generation, texts=texts, seed=seed
    )
  if batch.understanding is not None:
    cli.log(f'describing   each of {number} images {m.group_size} times')
    out['understanding'] = understanding(
      prober, model.processor, config, batch.understanding, seed=seed
    )
  return out


# Text to image.


def generation(
  prober: Prober, processor, config, batch: GenerationBatch, *, texts: list[str], seed: int
) -> Result:
  """R_G on images for the batch's prompts. texts: the prompts as text."""
  m, prompt = config.method, batch.prompt
  number = len(texts)
  instructions = list(dict.fromkeys((m.instruction, *INSTRUCTIONS)))[:3]
  drawn = prober.draw(prompt, instructions)
  rewards = drawn.rewards[:, 0]
  numbers = {'inputs': number, 'candidates': rewards.shape[1], **_ordering(rewards)}
  numbers['slopes'] = {
    'entropy': ranking.slope(rewards, drawn.code_entropy.mean(-1)),
    'own_log_probability': ranking.slope(rewards, drawn.code_logps.mean(-1)),
  }
  if number > 1:  # across prompts
    lengths = prompt.mask.sum(axis=1)
    numbers['slopes']['prompt_length'] = ranking.slope(rewards.mean(axis=1)[None], lengths[None])
  numbers['curvature'] = measures.curvature(rewards, drawn.code_logps.mean(-1), m)
  numbers['instructions'] = {
    'sentences': instructions,
    'mean': _agreement(drawn.rewards),
  }

  # What each image adds to the likelihood of each of its prompt's tokens.
  heat = drawn.text_logps - _unseen(prober, prompt, drawn.codes, m.instruction)[:, None]
  spans = [words.token_spans(processor, text) for text in texts]

  judged = None
  if config.data.prompts == 'scenes':
    prompts = scenes_lib.prompts(m.seed, number)
    judged = scenes_lib.judge_pictures(prompts, drawn.pixels)
    numbers |= _judged(rewards, judged, ('right', 'graded'), curve='right', pairs='graded')
    numbers['categories'] = _by_category(prompts, rewards, judged['right'])
    numbers['words'] = _lowest_words(prompts, judged['readings'], spans, heat)

  best = rewards.argmax(axis=1)

  def own_pairs():
    return [(text, drawn.codes[i, best[i]]) for i, text in enumerate(texts)]

  numbers['swaps'] = _swaps(prober, config, seed, 'generation', own_pairs)
  numbers['verdict'] = measures.decide('generation', numbers)
  n = min(SHOWN, number)
  patches = drawn.code_logps - drawn.unconditional_logps
  shown = dict(
    texts=texts[:n],
    pixels=drawn.pixels[:n],
    rewards=rewards[:n],
    spans=spans[:n],
    heat=heat[:n],
    patches=patches[np.arange(n), best[:n]],
    right=judged['right'][:n] if judged else None,
  )
  return Result(numbers, shown)


def _agreement(rewards) -> float | None:
  """Rewards (P, 3, G) by instruction -> the mean rank correlation of two instructions."""
  pairs = [
    ranking.rank_correlation(rewards[:, i], rewards[:, j]) for i in range(3) for j in range(i)
  ]
  known = [p for p in pairs if p is not None]
  return float(np.mean(known)) if known else None


def _unseen(prober, prompt, codes, instruction):
  """Log-probabilities (P, T) of the prompts' tokens without their image: the mean likelihood over
  the images of other prompts. codes: (P, G, N).
  """
  others = min(OTHERS, len(codes) - 1)
  rolled = [np.roll(codes[:, 0], -shift, axis=0) for shift in range(1, others + 1)]
  logps = prober.read_prompts(prompt, np.stack(rolled, axis=1), instruction)
  return np.logaddexp.reduce(logps, axis=1) - np.log(others)


def _by_category(prompts, rewards, right) -> dict:
  out = {}
  for category in dict.fromkeys(p.category for p in prompts):
    rows = [i for i, p in enumerate(prompts) if p.category == category]
    out[category] = ranking.best_mean_worst(rewards[rows], right[rows])
  return out


def _lowest_words(prompts, readings, spans, heat) -> dict:
  """Whether the word that an image supports least is one that the image gets wrong.

  heat: (P, G, T).
  """
  values, labels, clusters, groups = [], [], [], []
  number = heat.shape[1]
  for i, prompt in enumerate(prompts):
    for j in range(number):
      found = scenes_lib.wrong_words(prompt, readings[i * number + j])
      if not found:
        continue
      v = words.by_word(spans[i], heat[i, j], [(start, end) for start, end, _ in found])
      wrong = [w for _, _, w in found]
      groups.append((v, wrong))
      values += v
      labels += wrong
      clusters += [i] * len(v)
  return {
    **ranking.auc_interval(-np.array(values), labels, clusters),
    'lowest': measures.lowest_is_wrong(groups),
  }


# Image to text.


def understanding(
  prober: Prober, processor, config, batch: UnderstandingBatch, *, seed: int
) -> Result:
  """R_U on texts about the batch's images."""
  m, pixels = config.method, batch.pixels
  written = prober.describe(pixels, batch.question)
  texts = [
    [processor.decode(ids[mask]) for ids, mask in zip(*group)]
    for group in zip(written.ids, written.mask)
  ]
  length = (written.mask & (written.ids != processor.templates.eos_id)).sum(-1)
  rewards = written.rewards
  numbers = {'inputs': len(pixels), 'candidates': rewards.shape[1], **_ordering(rewards)}
  tokens = np.maximum(written.mask.sum(-1), 1)
  entropy = written.entropy.sum(-1) / tokens
  numbers['slopes'] = {
    'length': ranking.slope(rewards, length),
    'entropy': ranking.slope(rewards, entropy),
  }
  own_logps = np.where(written.mask, written.logps, 0.0).sum(-1) / tokens
  numbers['curvature'] = measures.curvature(rewards, own_logps, m)
  numbers['lengths'] = {'mean': float(length.mean()), 'empty': float((length == 0).mean())}

  # Support of each clause of every text.
  parts = [
    (i, j, clause)
    for i, group in enumerate(texts)
    for j, text in enumerate(group)
    for clause in words.clauses(text)
  ]
  support = clause_support(prober, written, [(i, c) for i, _, c in parts], m.instruction)

  judged, wrong = None, [None] * len(parts)
  if config.data.images == 'scenes':
    scenes = scenes_lib.scenes(m.seed, len(pixels))
    judged = scenes_lib.judge_texts(scenes, texts)
    numbers |= _judged(rewards, judged, ('right', 'f1'), curve='f1', pairs='f1')
    wrong = [scenes_lib.wrong_clause(c.text, scenes[i]) for i, _, c in parts]
    numbers['clauses'] = {
      'all': _unsupported(parts, support, wrong, ('thing', 'relation')),
      'things': _unsupported(parts, support, wrong, ('thing',)),
      'relations': _unsupported(parts, support, wrong, ('relation',)),
    }

  def own_pairs():
    best = [(i, texts[i][j]) for i, j in enumerate(rewards.argmax(axis=1))]
    return [(text, written.codes[i]) for i, text in best if text.strip()]

  numbers['swaps'] = _swaps(prober, config, seed, 'understanding', own_pairs)
  numbers['verdict'] = measures.decide('understanding', numbers)
  n = min(SHOWN, len(pixels))
  clauses = [[[] for _ in group] for group in texts[:n]]
  for (i, j, clause), value, bad in zip(parts, support, wrong):
    if i < n:
      clauses[i][j].append((clause.text, value, bad))
  shown = dict(
    pixels=pixels[:n],
    texts=texts[:n],
    rewards=rewards[:n],
    clauses=clauses,
    scores=judged['f1'][:n] if judged else None,
  )
  return Result(numbers, shown)


def clause_support(prober, written: ProbedTexts, parts, instruction) -> list[float]:
  """How much more likely a clause makes its image: log p(codes | with it) - log p(codes | without),
  in nats per image.

  parts: [(input, `words.Clause`)].
  """
  jobs = list(
    dict.fromkeys((i, text) for i, c in parts for text in (c.with_it, c.without) if text.strip())
  )
  known = {(i, ''): written.unconditional_logps[i].sum() for i, _ in parts}
  if jobs:
    texts = [text for _, text in jobs]
    codes = written.codes[[i for i, _ in jobs]]
    _, logps = prober.score_pairs(texts, codes, instruction)
    known |= dict(zip(jobs, logps.sum(-1)))
  return [float(known[i, c.with_it] - known[i, c.without]) for i, c in parts]


def _unsupported(parts, support, wrong, kinds) -> dict:
  rows = [k for k, (_, _, c) in enumerate(parts) if wrong[k] is not None and c.kind in kinds]
  return ranking.auc_interval(
    scores=-np.array([support[k] for k in rows]),
    labels=[wrong[k] for k in rows],
    clusters=[parts[k][0] for k in rows],
  )


# Both.


def _ordering(rewards) -> dict:
  """The numbers that need no judge. rewards (P, G)."""
  ranked = np.sort(rewards, axis=1)
  return {
    'reward': {
      'best': float(ranked[:, -1].mean()),
      'mean': float(rewards.mean()),
      'worst': float(ranked[:, 0].mean()),
    },
    'ties': ranking.ties(rewards),
    'spread': ranking.spread(rewards),
    'unfamiliar': measures.unfamiliar(rewards),
  }


def _judged(rewards, judged, names, *, curve: str, pairs: str) -> dict:
  """Best, mean and worst of G in the judge's scores `names`; best of n = 1 ... G in the score
  `curve`; pairs ordered as by the score `pairs`.
  """
  return {
    'judged': {name: ranking.best_mean_worst(rewards, judged[name]) for name in names},
    'best_of': {
      'by_reward': ranking.best_of_curve(rewards, judged[curve]),
      'by_judge': ranking.best_of_curve(judged[curve], judged[curve]),
    },
    'pairwise': ranking.pairwise_accuracy(rewards, judged[pairs]),
  }


def _swaps(prober, config, seed, task, own_pairs) -> dict:
  """How often this task's reward prefers a text to the same text with one attribute changed.

  In Scenes, the texts are from true pairs that no run sees; otherwise from own_pairs(): texts with
  the images (codes) that have the highest reward.
  """
  named = config.data.prompts if task == 'generation' else config.data.images
  if named == 'scenes':
    pairs = scenes_lib.true_pairs(SWAPS, seed)
    codes = prober.encode(np.stack([pixels for _, _, pixels in pairs]))
    cases = [(kind, text, c) for (kind, text, _), c in zip(pairs, codes)]
  else:
    cases = [(kind, text, codes) for text, codes in own_pairs() for kind in words.KINDS]
  cases = [
    (kind, text, other, codes)
    for kind, text, codes in cases
    if (other := words.swapped(text, kind))
  ]
  if not cases:
    return {'mean': None}

  texts = [text for _, text, _, _ in cases] + [other for _, _, other, _ in cases]
  codes = np.stack([codes for *_, codes in cases] * 2)
  given_picture, given_text = prober.score_pairs(texts, codes, config.method.instruction)
  true, false = np.split(given_picture if task == 'generation' else given_text.mean(-1), 2)
  hits = np.where(true == false, 0.5, true > false)
  out = {}
  for kind in words.KINDS:
    rows = [i for i, case in enumerate(cases) if case[0] == kind]
    if rows:
      out[kind] = {**stats.share(hits[rows])._asdict(), 'cases': len(rows)}
  mean = float(np.mean([v['value'] for v in out.values()]))
  return {**out, 'mean': mean, 'cases': len(cases)}
