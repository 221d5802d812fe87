"""The replay's page: the step's numbers beside the logged ones, what each input contributed to the
gradient, and some inputs in detail.

Axes: G samples of an input, C samples that learn, T tokens, N image codes, H W pixels.
"""

import dataclasses
from typing import Any

import numpy as np

from dsr_jax import state as state_lib
from dsr_jax.inference import Sampler
from dsr_jax.reporting import html as page_lib


@dataclasses.dataclass(frozen=True)
class ShownInput:
  """What the page shows of one input.

  Attributes:
    index: its index among the task's inputs.
    seen: its row of `look.Seen`, by field.
    other_rewards: (G,) under the other method, if there is one.
    prompt: generation: the prompt's text.
    pixels: uint8; generation: the samples (G, H, W, 3); understanding: the input image (H, W, 3).
    texts: understanding: the samples as texts.
    tokens: understanding: the samples token by token.
  """

  index: int
  seen: dict[str, Any]
  other_rewards: np.ndarray | None
  pixels: np.ndarray
  prompt: str = ''
  texts: tuple[str, ...] = ()
  tokens: tuple[list[str], ...] = ()


def prepare(model, state, batch, seen: dict, other: dict | None, chosen: list[int]) -> dict:
  """{task: [`ShownInput`]} for the inputs `chosen`.

  model: `families.Model`. state: before the step. seen, other: `look.Seen` by task, under the run's
  method and, if there is one, the other method.
  """
  sampler = Sampler(model.graphdef, model.processor, chunk=1, seed=0)
  shown = {}
  for task, part in seen.items():
    shown[task] = []
    for i in chosen:
      facts = dict(
        index=i,
        seen={
          name: getattr(part, name)[i]
          for name in ('rewards', 'learners', 'weight', 'push', 'share', 'logps', 'mask')
        },
        other_rewards=other[task].rewards[i] if other else None,
      )
      if task == 'generation':
        prompt = batch.generation.prompt
        (words,) = sampler.words(
          np.asarray(prompt.ids)[i : i + 1], np.asarray(prompt.mask)[i : i + 1]
        )
        params = state_lib.policy_params(state, model.family)
        pixels = sampler.decode(params, part.samples[i : i + 1])[0]
        shown[task].append(ShownInput(**facts, prompt=words, pixels=pixels))
      else:
        ids, mask = part.samples.ids[i], part.samples.mask[i]
        shown[task].append(
          ShownInput(
            **facts,
            pixels=np.asarray(batch.understanding.pixels[i]),
            texts=tuple(sampler.words(ids, mask)),
            tokens=tuple(_token_texts(model, row[keep]) for row, keep in zip(ids, mask)),
          )
        )
  return shown


def _token_texts(model, ids) -> list[str]:
  return [model.processor.tokenizer.decode([int(t)]) or '·' for t in ids]


def page(result: dict, shown: dict) -> str:
  """The page as HTML. result: the content of replay.json. shown: from `prepare`."""
  other = result.get('what_if')
  return page_lib.render(
    'replay.html.j2',
    title=f'Step {result["step"]} of {result["workdir"]}',
    result=result,
    differences=_differences(result),
    all_numbers=_all_numbers(result),
    what_if=_what_if(result, other) if other else None,
    shares=_shares(result),
    prompts=[_prompt(one) for one in shown.get('generation', ())],
    pictures=[_picture(one) for one in shown.get('understanding', ())],
  )


# The step's numbers.


def _differences(result) -> page_lib.Table | None:
  """The numbers that differ from the logged ones."""
  rows = []
  for name, (logged, _) in sorted(result['differences'].items()):
    rows.append([name, _shown(logged), _shown(result['metrics'].get(name))])
  return page_lib.Table(['', 'logged', 'recomputed'], rows) if rows else None


def _all_numbers(result) -> page_lib.Table:
  rows = []
  for name in sorted(result['metrics'].keys() | result['differences'].keys()):
    now = result['metrics'].get(name)
    logged = result['differences'][name][0] if name in result['differences'] else now
    rows.append([name, _shown(logged), _shown(now)])
  return page_lib.Table(['', 'logged', 'recomputed'], rows)


def _what_if(result, other) -> dict:
  """The other update in words, and the numbers that it changes."""
  changes = ' '.join(f'{name}={value}' for name, value in other['changes'].items())
  tasks = '; '.join(
    f'{task}: the same best in {100 * found["same_best"]:.0f} %, the same worst in '
    f'{100 * found["same_worst"]:.0f} % of groups'
    for task, found in other['tasks'].items()
  )
  rows = []
  for name in sorted(result['metrics'].keys() | other['metrics'].keys()):
    values = [_shown(numbers.get(name)) for numbers in (result['metrics'], other['metrics'])]
    if values[0] != values[1]:
      rows.append([name, *values])
  return {
    'changes': changes,
    'words': f'The other update has cosine {other["cosine"]:.3f} with the one that the run made '
    f'and {other["norm_ratio"]:.3f} times its length. {tasks}.',
    'numbers': page_lib.Table(['', 'recomputed', changes], rows),
  }


def _shown(x) -> str:
  return '' if x is None else f'{x:.6g}'


def _shares(result) -> list[tuple[str, list]]:
  """(title, rows of the macro `shares`): the step's gradient by input and by part of the model."""
  found = []
  for task in ('generation', 'understanding'):
    if task in result:
      shares = enumerate(result[task]['gradient_shares'])
      found.append((task, _bars([(f'input {i}', share) for i, share in shares], task)))
  parts = list(result['gradient_by_part'].items())
  return [*found, ('parts of the model, squared norm', _bars(parts, 'other'))]


def _bars(values, role: str) -> list[tuple]:
  """A value below 0 has no role, so it is drawn in red."""
  most = max((abs(value) for _, value in values), default=0) or 1
  return [
    (name, page_lib.signed(value), f'{100 * abs(value) / most:.1f}', role if value >= 0 else '')
    for name, value in values
  ]


# Inputs.


def _marks(one: ShownInput) -> dict[int, str]:
  """Marks of the two samples of a pair; empty if the whole group or no sample learns."""
  learners = one.seen['learners']
  if len(learners) == 2 and one.seen['weight'] > 0:
    return {int(learners[1]): 'down', int(learners[0]): 'up'}
  return {}


def _facts(one: ShownInput, words: str) -> dict:
  """What the page says about an input of either task."""
  title = f'Input {one.index}: {page_lib.signed(float(one.seen["share"]))} of the gradient'
  if one.seen['weight'] <= 0:
    title += ', dropped (equal rewards)'
  return {'title': title, 'words': words, 'numbers': _table(one)}


def _table(one: ShownInput) -> page_lib.Table:
  """The samples with reward, mean log-probability, push, and the other reward."""
  seen, other = one.seen, one.other_rewards
  push = dict(zip(seen['learners'].tolist(), seen['push'].tolist()))
  rows = []
  for j in range(len(seen['rewards'])):
    logps = seen['logps'][j][seen['mask'][j]]
    row = [
      f'candidate {j}',
      float(seen['rewards'][j]),
      float(logps.mean()) if logps.size else 0.0,
      page_lib.signed(push[j], 4) if j in push else '',
    ]
    if other is not None:
      row.append(float(other[j]))
    rows.append(row)
  head = ['', 'reward', 'mean log p', 'push']
  if other is not None:
    head.append('other reward')
  return page_lib.Table(head, rows)


def _prompt(one: ShownInput) -> dict:
  """A prompt: its samples, and heat maps of log-probabilities for the first two that learn."""
  seen, marks = one.seen, _marks(one)
  samples = [
    page_lib.Sample(marks.get(j, ''), [f'{j}: {reward:.2f}'], src=page_lib.picture(one.pixels[j]))
    for j, reward in enumerate(seen['rewards'])
  ]
  mean = seen['logps'].mean()
  heats = [page_lib.patches(one.pixels[j], seen['logps'][j] - mean) for j in seen['learners'][:2]]
  return _facts(one, one.prompt) | {'samples': samples, 'heats': heats}


def _picture(one: ShownInput) -> dict:
  """An image: its texts, and the first two that learn, token by token."""
  seen, marks = one.seen, _marks(one)
  texts = [
    page_lib.Sample(marks.get(j, ''), [f'{j}: {reward:.2f}'], text=one.texts[j])
    for j, reward in enumerate(seen['rewards'])
  ]
  heats = []
  for j in seen['learners'][:2]:
    logps = seen['logps'][j][seen['mask'][j]]
    parts = [
      page_lib.Word(token, float(logp) / 2, f'{logp:.1f}')
      for token, logp in zip(one.tokens[j], logps)
    ]
    heats.append((f'candidate {j}', parts))
  src = page_lib.picture(one.pixels)
  return _facts(one, '') | {'src': src, 'texts': texts, 'heats': heats}
