"""The probe's measurements of each task: samples, rewards, judgements and words brought together as
numbers and as what the page shows.

Axes: P inputs, G candidates, M other pictures, T text tokens, N image codes.
"""

import dataclasses

import numpy as np

from dsr_jax import cli as commands
from dsr_jax.data import batches as batches_lib
from dsr_jax.probe import measures, words
from dsr_jax.probe import scenes as scenes_lib
from dsr_jax.probe.model import Prober

INSTRUCTIONS = (
  'Describe this image in detail.',
  'What is in the picture?',
  'Write a caption for this image.',
)
OTHERS = 8  # pictures of other prompts that stand for "no picture"
SWAPS = 64  # true pairs of each kind
SHOWN = 4  # inputs of each task on the page


@dataclasses.dataclass
class Result:
  """numbers of a task for probe.json, and what the page shows of it."""

  numbers: dict
  shown: dict


def probe(graphdef, bundle, config, number: int, seed: int) -> dict:
  """Everything about `number` prompts and as many pictures: {'generation', 'understanding'} ->
  Result, tasks of the config alone.

  bundle: with config, params and processor, as `convert.load` gives it; graphdef: the model's
    structure. Errors: InputError where prompts
  or pictures do not suit the model.
  """
  m = config.method
  # Both tasks at once, whoever would learn first; of the run's reward nothing is asked here.
  inputs = dataclasses.replace(
    m, strategy='unified', reward='dual', inputs_per_step=number * len(m.tasks), accumulate=1
  )
  batches = batches_lib.make(config.data, inputs, bundle.processor, bundle.config.image_size)
  batch = batches.at(0)
  prober = Prober(graphdef, bundle.params, bundle.processor, m, config.system, seed)
  out = {}
  if 'generation' in m.tasks:
    commands.log(f'drawing      {m.group_size} pictures of each of {number} prompts')
    out['generation'] = generation(
      prober, bundle.processor, config, batch, batches.texts_at(0), seed
    )
  if 'understanding' in m.tasks:
    commands.log(f'describing   each of {number} pictures {m.group_size} times')
    out['understanding'] = understanding(prober, bundle.processor, config, batch, seed)
  return out


def generation(prober, processor, config, batch, texts, seed: int) -> Result:
  """R_G on pictures of the batch's prompts. texts: the prompts in words."""
  m, ids, mask = config.method, batch['prompt_ids'], batch['prompt_mask']
  instructions = list(dict.fromkeys((m.instruction, *INSTRUCTIONS)))[:3]
  drawn = prober.draw(ids, mask, instructions)
  rewards = drawn.rewards[:, 0]
  numbers = {'inputs': len(ids), 'candidates': rewards.shape[1], **_ordering(rewards)}
  numbers['slopes'] = {
    'entropy': measures.slope(rewards, drawn.code_entropy.mean(-1)),
    'own_log_probability': measures.slope(rewards, drawn.code_logps.mean(-1)),
  }
  if len(ids) > 1:  # between prompts
    numbers['slopes']['prompt_length'] = measures.slope(rewards.mean(1)[None], mask.sum(1)[None])
  pairs = [
    measures.rank_correlation(drawn.rewards[:, i], drawn.rewards[:, j])
    for i in range(3)
    for j in range(i)
  ]
  known = [p for p in pairs if p is not None]
  numbers['instructions'] = {
    'sentences': instructions,
    'mean': float(np.mean(known)) if known else None,
  }

  # The prompt's tokens without their picture: the mean likelihood over pictures of other prompts.
  others = min(OTHERS, len(ids) - 1)
  codes = np.stack(
    [np.roll(drawn.codes[:, 0], -shift, axis=0) for shift in range(1, others + 1)], axis=1
  )
  unseen = prober.read(ids, mask, codes, m.instruction)
  heat = (
    drawn.text_logps - (np.logaddexp.reduce(unseen, axis=1) - np.log(others))[:, None]
  )  # (P, G, T)
  spans = [words.token_spans(processor, text) for text in texts]

  judged = None
  if config.data.prompts == 'scenes':
    prompts = scenes_lib.prompts(m.seed, len(ids))
    judged = scenes_lib.judge_pictures(prompts, drawn.pixels)
    numbers |= _judged(rewards, judged, ('right', 'graded'), 'right', 'graded')
    numbers['categories'] = {
      category: measures.best_mean_worst(rewards[rows], judged['right'][rows])
      for category in dict.fromkeys(p.category for p in prompts)
      for rows in [[i for i, p in enumerate(prompts) if p.category == category]]
    }
    numbers['words'] = _lowest_words(prompts, judged['readings'], spans, heat)
  numbers['swaps'] = _swaps(
    prober,
    config,
    seed,
    'generation',
    lambda: [(t, drawn.codes[i, rewards[i].argmax()]) for i, t in enumerate(texts)],
  )
  n = min(SHOWN, len(ids))
  best = rewards.argmax(1)
  shown = dict(
    texts=texts[:n],
    pixels=drawn.pixels[:n],
    rewards=rewards[:n],
    spans=spans[:n],
    heat=heat[:n],
    patches=(drawn.code_logps - drawn.bare_logps)[np.arange(n), best[:n]],
    right=judged['right'][:n] if judged else None,
  )
  return Result(numbers | {'verdict': measures.decide('generation', numbers)}, shown)


def understanding(prober, processor, config, batch, seed: int) -> Result:
  """R_U on texts about the batch's pictures."""
  m, pixels = config.method, batch['pixels']
  told = prober.tell(pixels, batch['question_ids'], batch['question_mask'])
  eos = processor.templates.eos_id
  texts = [
    [processor.decode(ids[mask]) for ids, mask in zip(*group)] for group in zip(told.ids, told.mask)
  ]
  length = (told.mask & (told.ids != eos)).sum(-1)
  rewards = told.rewards
  numbers = {'inputs': len(pixels), 'candidates': rewards.shape[1], **_ordering(rewards)}
  entropy = told.entropy.sum(-1) / np.maximum(told.mask.sum(-1), 1)
  numbers['slopes'] = {
    'length': measures.slope(rewards, length),
    'entropy': measures.slope(rewards, entropy),
  }
  numbers['lengths'] = {'mean': float(length.mean()), 'empty': float((length == 0).mean())}

  # Support of each clause of every text.
  parts = [
    (i, j, clause)
    for i, group in enumerate(texts)
    for j, text in enumerate(group)
    for clause in words.clauses(text)
  ]
  support = clause_support(prober, told, [(i, c) for i, _, c in parts], m.instruction)
  judged, wrong = None, [None] * len(parts)
  if config.data.images == 'scenes':
    scenes = scenes_lib.scenes(m.seed, len(pixels))
    judged = scenes_lib.judge_texts(scenes, texts)
    numbers |= _judged(rewards, judged, ('right', 'f1'), 'f1', 'f1')
    wrong = [scenes_lib.wrong_clause(c.text, scenes[i]) for i, _, c in parts]
    numbers['clauses'] = {
      kind: _unsupported(parts, support, wrong, kinds)
      for kind, kinds in (
        ('all', ('thing', 'relation')),
        ('things', ('thing',)),
        ('relations', ('relation',)),
      )
    }
  numbers['swaps'] = _swaps(
    prober,
    config,
    seed,
    'understanding',
    lambda: [
      (texts[i][j], told.codes[i]) for i, j in enumerate(rewards.argmax(1)) if texts[i][j].strip()
    ],
  )
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
  return Result(numbers | {'verdict': measures.decide('understanding', numbers)}, shown)


def clause_support(prober, told, parts, instruction) -> list[float]:
  """How much likelier a clause makes its picture: log p(codes | with it) - log p(codes | without),
  nats a picture.

  parts: [(input, `probe_words.Clause`)].
  """
  jobs = list(
    dict.fromkeys((i, text) for i, c in parts for text in (c.with_it, c.without) if text.strip())
  )
  known = {(i, ''): told.bare_logps[i].sum() for i, _ in parts}
  if jobs:
    _, logps = prober.both(
      [text for _, text in jobs], told.codes[[i for i, _ in jobs]], instruction
    )
    known |= dict(zip(jobs, logps.sum(-1)))
  return [float(known[i, c.with_it] - known[i, c.without]) for i, c in parts]


def _ordering(rewards) -> dict:
  """What needs no judge."""
  ranked = np.sort(rewards, axis=1)
  return {
    'reward': {
      'best': float(ranked[:, -1].mean()),
      'mean': float(rewards.mean()),
      'worst': float(ranked[:, 0].mean()),
    },
    'ties': measures.ties(rewards),
    'spread': measures.spread(rewards),
  }


def _judged(rewards, judged, names, curve, pairs) -> dict:
  """Best, mean and worst of G by the judge's scores `names`; best of n = 1 ... G by `curve`; pairs
  ordered as by `pairs`.
  """
  return {
    'judged': {name: measures.best_mean_worst(rewards, judged[name]) for name in names},
    'best_of': {
      'by_reward': measures.best_of_curve(rewards, judged[curve]),
      'by_judge': measures.best_of_curve(judged[curve], judged[curve]),
    },
    'pairwise': measures.pairwise_accuracy(rewards, judged[pairs]),
  }


def _lowest_words(prompts, readings, spans, heat) -> dict:
  """Whether the word that a picture supports least is the one that the picture gets wrong. heat (P,
  G, T).
  """
  values, labels, clusters, groups = [], [], [], []
  for i, prompt in enumerate(prompts):
    for j in range(heat.shape[1]):
      found = scenes_lib.wrong_words(prompt, readings[i * heat.shape[1] + j])
      if found:
        v = words.by_word(spans[i], heat[i, j], [f[:2] for f in found])
        w = [f[2] for f in found]
        groups.append((v, w))
        values += v
        labels += w
        clusters += [i] * len(v)
  return {
    **measures.auc_interval(-np.array(values), labels, clusters),
    'lowest': measures.lowest_is_wrong(groups),
  }


def _unsupported(parts, support, wrong, kinds) -> dict:
  rows = [k for k, (_, _, c) in enumerate(parts) if wrong[k] is not None and c.kind in kinds]
  return measures.auc_interval(
    -np.array([support[k] for k in rows]), [wrong[k] for k in rows], [parts[k][0] for k in rows]
  )


def _swaps(prober, config, seed, task, own) -> dict:
  """How often a text is preferred to itself with one attribute changed, by the reward of this task.

  In Scenes: true pairs that no run sees. Elsewhere own(): texts with the pictures (codes) that the
    reward likes best.
  """
  named = config.data.prompts if task == 'generation' else config.data.images
  if named == 'scenes':
    pairs = scenes_lib.true_pairs(SWAPS, seed)
    codes = prober.tokenize(np.stack([pixels for _, _, pixels in pairs]))
    cases = [(kind, text, c) for (kind, text, _), c in zip(pairs, codes)]
  else:
    cases = [(kind, text, codes) for text, codes in own() for kind in words.KINDS]
  cases = [
    (kind, text, other, codes)
    for kind, text, codes in cases
    if (other := words.swapped(text, kind))
  ]
  if not cases:
    return {'mean': None}
  texts, codes = [c[1] for c in cases] + [c[2] for c in cases], np.stack([c[3] for c in cases] * 2)
  given_picture, given_text = prober.both(texts, codes, config.method.instruction)
  true, false = np.split(given_picture if task == 'generation' else given_text.mean(-1), 2)
  hits = np.where(true == false, 0.5, true > false)
  found = {
    kind: {**measures.share(hits[rows])._asdict(), 'cases': len(rows)}
    for kind in words.KINDS
    for rows in [[i for i, c in enumerate(cases) if c[0] == kind]]
    if rows
  }
  return {**found, 'mean': float(np.mean([f['value'] for f in found.values()]))}
