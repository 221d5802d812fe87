"""The replay's page: the step's numbers beside the logged ones, whose gradient it was, and some
inputs in detail.

Axes: G samples of an input, C samples that learn, T tokens, N image codes, H W pixels.
"""

import dataclasses
import html
from typing import Any

import numpy as np

from dsr_jax import images
from dsr_jax import state as state_lib
from dsr_jax.inference import Sampler
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting import sheets

NOTE_ON_PICTURES = (
  'The first two that learn, with the log-probability of each code above (green) or below the mean '
  'of the group.'
)
NOTE_ON_TEXTS = 'Log-probability of each token of the first two that learn.'


@dataclasses.dataclass(frozen=True)
class ShownInput:
  """What the page shows of one input.

  Attributes:
    index: its place among the task's inputs.
    seen: its row of `look.Seen`, by field.
    other_rewards: (G,) under the other method, where a what-if was asked for.
    prompt: generation: in words.
    pixels: uint8; generation: the samples' (G, H, W, 3); understanding: its own (H, W, 3).
    texts: understanding: the samples in words.
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
  """{task: [`ShownInput`]} of the inputs `chosen`.

  model: `families.Model`. state: before the step. seen, other: `look.Seen` by task; other where a
  what-if was asked for.
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
  """result: replay.json. shown: of `prepare`."""
  exact = '<span class="verdict go">the very same numbers</span>'
  if not result['exact']:
    exact = f'<span class="verdict nogo">{len(result["differences"])} numbers differ</span>'
  start = 'the initial model'
  if result['from_checkpoint']:
    start = f'the checkpoint of step {result["from_checkpoint"]}'
  body = [
    f'<h1>Step {result["step"]} again</h1><p class="lead">{html.escape(result["workdir"])}, from '
    f'{start}: {exact}</p>',
    _metrics(result),
    _shares(result),
  ]
  sections = {
    'generation': ('Pictures of prompts', _picture_input),
    'understanding': ('Texts about pictures', _text_input),
  }
  for task, inputs in shown.items():
    title, section = sections[task]
    body.append(f'<h2>{title}</h2>' + ''.join(section(one) for one in inputs))
  return page_lib.whole(f'Step {result["step"]} of {result["workdir"]}', ''.join(body))


# The step's numbers.


def _metrics(result) -> str:
  other = result.get('what_if')
  names = result['metrics'].keys() | result['differences'].keys()
  if other:
    names |= other['metrics'].keys()
  rows = []
  for name in sorted(names):
    now = result['metrics'].get(name)
    logged = result['differences'][name][0] if name in result['differences'] else now
    row = [name, _shown(logged), _shown(now)]
    if other:
      row.append(_shown(other['metrics'].get(name)))
    rows.append(row)
  head = ['', 'logged', 'recomputed']
  note = ''
  if other:
    head.append(' '.join(f'{k}={v}' for k, v in other['changes'].items()))
    note = _what_if_note(other)
  return note + page_lib.table('Metrics', head, rows)


def _shown(x) -> str:
  return '' if x is None else f'{x:.6g}'


def _what_if_note(other) -> str:
  tasks = '; '.join(
    f'{task}: the same best in {100 * found["same_best"]:.0f} %, the same worst in '
    f'{100 * found["same_worst"]:.0f} % of groups'
    for task, found in other['tasks'].items()
  )
  return (
    f'<p class="lead">The other update has cosine {other["cosine"]:.3f} with the one that was made '
    f'and {other["norm_ratio"]:.3f} times its length. {tasks}.</p>'
  )


def _shares(result) -> str:
  """Bars: the share of the step's gradient by input and by part of the model."""
  out = [
    '<h2>Whose gradient</h2><p class="lead">Shares of the whole gradient along itself; they add up '
    'to 1, and one below 0 works against the others.</p>'
  ]
  for task in ('generation', 'understanding'):
    if task in result:
      shares = enumerate(result[task]['gradient_shares'])
      out.append(_bars(task, [(f'input {i}', share) for i, share in shares]))
  parts = list(result['gradient_by_part'].items())
  return ''.join(out) + _bars('parts of the model, squared norm', parts)


def _bars(title, values) -> str:
  most = max((abs(v) for _, v in values), default=0) or 1
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td><td class="n">{v:+.3f}</td><td style="width:70%">'
    f'{_bar(v, most)}</td></tr>'
    for name, v in values
  )
  return f'<details open><summary>{html.escape(title)}</summary><table>{rows}</table></details>'


def _bar(value, most) -> str:
  color = 'up' if value >= 0 else 'down'
  width = 100 * abs(value) / most
  style = f'height:12px;border-radius:3px;width:{width:.1f}%;background:var(--{color})'
  return f'<div style="{style}"></div>'


# Inputs.


def _verdicts(one: ShownInput):
  """Indices of the first and last that learn where a pair does, for the sheets' frames; none where
  the whole group or nobody does.
  """
  learners = one.seen['learners']
  if len(learners) == 2 and one.seen['weight'] > 0:
    return [learners[0]], [learners[1]]
  return [-1], [-1]


def _table(one: ShownInput) -> str:
  """The samples: reward, mean log-probability, push, and the other reward."""
  seen, other = one.seen, one.other_rewards
  push = dict(zip(seen['learners'].tolist(), seen['push'].tolist()))
  rows = []
  for j in range(len(seen['rewards'])):
    logps = seen['logps'][j][seen['mask'][j]]
    row = [
      f'candidate {j}',
      float(seen['rewards'][j]),
      float(logps.mean()) if logps.size else 0.0,
      f'{push[j]:+.4f}' if j in push else '',
    ]
    if other is not None:
      row.append(float(other[j]))
    rows.append(row)
  head = ['', 'reward', 'mean log p', 'push']
  if other is not None:
    head.append('other reward')
  title = f'Input {one.index}: {seen["share"]:+.3f} of the gradient'
  if seen['weight'] <= 0:
    title += ', dropped (equal rewards)'
  return page_lib.table(title, head, rows)


def _picture_input(one: ShownInput) -> str:
  seen = one.seen
  chosen, rejected = _verdicts(one)
  sheet = sheets.candidates([one.prompt], one.pixels[None], seen['rewards'][None], chosen, rejected)
  mean = seen['logps'].mean()
  heats = ''.join(
    page_lib.picture(page_lib.patches(one.pixels[j], seen['logps'][j] - mean))
    for j in seen['learners'][:2]
  )
  figure = page_lib.figure(images.png(sheet), one.prompt)
  note = f'<p class="lead">{NOTE_ON_PICTURES}</p>'
  return f'{_table(one)}{figure}{note}<div class="row">{heats}</div>'


def _text_input(one: ShownInput) -> str:
  seen = one.seen
  chosen, rejected = _verdicts(one)
  sheet = sheets.captions(
    one.pixels[None], [list(one.texts)], seen['rewards'][None], chosen, rejected
  )
  words = ''
  for j in seen['learners'][:2]:
    logps = seen['logps'][j][seen['mask'][j]]
    parts = [
      (token, float(logp) / 2, False, f'{logp:.1f}') for token, logp in zip(one.tokens[j], logps)
    ]
    words += f'<p class="lead">candidate {j}</p>' + page_lib.heat(parts)
  figure = page_lib.figure(images.png(sheet), f'Picture {one.index}')
  return f'{_table(one)}{figure}<p class="lead">{NOTE_ON_TEXTS}</p>{words}'
