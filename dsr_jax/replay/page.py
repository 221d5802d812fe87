"""The replay's page: the step's numbers beside the logged ones, whose gradient it was, and some
inputs in detail.

Axes: B inputs of a task, G candidates, C candidates that learn, T tokens, N image codes, H W
  pixels.
"""

import html

import jax
import numpy as np

from dsr_jax import state as state_lib
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting import sheets as pictures_lib


def prepare(model, state, batch, seen: dict, other: dict | None, chosen: list[int]) -> dict:
  """What the page shows of the inputs `chosen`: {task: [an input's prompt or pixels, pictures or
  texts, and its row of `Seen`]}.

  model: `parts.Model`; state: before the step. seen, other: `replay_step.Seen` by task; other where
    a what-if was asked for.
  """

  def read(ids, mask):
    return model.processor.decode([int(i) for i in np.asarray(ids)[np.asarray(mask)]])

  out = {}
  for task, part in seen.items():
    rows = []
    for i in chosen:
      row = dict(
        input=i,
        rewards=part.rewards[i],
        index=part.index[i],
        weight=part.weight[i],
        push=part.push[i],
        share=part.share[i],
        logps=part.logps[i],
        mask=part.mask[i],
        other=other and other[task].rewards[i],
      )
      if task == 'generation':
        params = state_lib.fixed_parts(state)
        trained = state['params'].get('generator', state['params'])
        codes = part.candidates[i]

        def decode(codes):
          return state_lib.build(model.graphdef, params, trained).picture_from_codes(codes).pixels

        row |= dict(
          prompt=read(batch['prompt_ids'][i], batch['prompt_mask'][i]),
          pixels=processor_lib.to_uint8(np.asarray(jax.jit(decode)(codes))),
        )
      else:
        texts = part.candidates

        def tokens(j):
          return [
            model.processor.tokenizer.decode([int(t)]) or '·'
            for t in texts.ids[i, j][texts.mask[i, j]]
          ]

        row |= dict(
          pixels=np.asarray(batch['pixels'][i]),
          texts=[read(texts.ids[i, j], texts.mask[i, j]) for j in range(len(texts.ids[i]))],
          tokens=[tokens(j) for j in range(len(texts.ids[i]))],
        )
      rows.append(row)
    out[task] = rows
  return out


def page(result: dict, shown: dict) -> str:
  """result: replay.json. shown: of `prepare`."""
  exact = (
    '<span class="verdict go">the very same numbers</span>'
    if result['exact']
    else f'<span class="verdict nogo">{len(result["differences"])} numbers differ</span>'
  )
  start = (
    f'the checkpoint of step {result["from_checkpoint"]}'
    if result['from_checkpoint']
    else 'the initial model'
  )
  body = [
    f'<h1>Step {result["step"]} again</h1><p class="lead">{html.escape(result["workdir"])}, from '
    f'{start}: {exact}</p>',
    _metrics(result),
    _shares(result),
  ]
  for task, rows in shown.items():
    title = 'Pictures of prompts' if task == 'generation' else 'Texts about pictures'
    body.append(
      f'<h2>{title}</h2>'
      + ''.join(_picture_input(r) if task == 'generation' else _text_input(r) for r in rows)
    )
  return page_lib.whole(f'Step {result["step"]} of {result["workdir"]}', ''.join(body))


def _metrics(result):
  rows, other = [], result.get('what_if')
  names = sorted(
    result['metrics'].keys()
    | result['differences'].keys()
    | (other['metrics'].keys() if other else set())
  )
  for name in names:
    now = result['metrics'].get(name)
    logged = result['differences'][name][0] if name in result['differences'] else now

    def show(x):
      return '' if x is None else f'{x:.6g}'

    rows.append(
      (name, show(logged), show(now), *([show(other['metrics'].get(name))] if other else []))
    )
  head = (
    '',
    'logged',
    'recomputed',
    *([' '.join(f'{k}={v}' for k, v in other['changes'].items())] if other else []),
  )
  note = ''
  if other:
    tasks = '; '.join(
      f'{task}: the same best in {100 * t["same_best"]:.0f} %, the same worst in '
      f'{100 * t["same_worst"]:.0f} % of groups'
      for task, t in other['tasks'].items()
    )
    note = (
      f'<p class="lead">The other update has cosine {other["cosine"]:.3f} with the one that was '
      f'made and {other["norm_ratio"]:.3f} times its '
      f'length. {tasks}.</p>'
    )
  return note + page_lib.table('Metrics', head, rows)


def _shares(result):
  """Bars: the share of the step's gradient by input and by part of the model."""
  out = [
    '<h2>Whose gradient</h2><p class="lead">Shares of the whole gradient along itself; they add up '
    'to 1, and one below 0 works against the '
    'others.</p>'
  ]
  for task in ('generation', 'understanding'):
    if task in result:
      out.append(
        _bars(
          task, [(f'input {i}', share) for i, share in enumerate(result[task]['gradient_shares'])]
        )
      )
  return ''.join(out) + _bars(
    'parts of the model, squared norm', list(result['gradient_by_part'].items())
  )


def _bars(title, values):
  most = max((abs(v) for _, v in values), default=0) or 1

  def bar(v):
    return f'<div style="height:12px;border-radius:3px;width:{100 * abs(v) / most:.1f}%;background:var(--{"up" if v >= 0 else "down"})"></div>'

  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td><td class="n">{v:+.3f}</td><td '
    f'style="width:70%">{bar(v)}</td></tr>'
    for name, v in values
  )
  return f'<details open><summary>{html.escape(title)}</summary><table>{rows}</table></details>'


def _verdicts(row):
  """Indices of the first and last that learn where a pair does, for the sheets' frames; none where
  the whole group or nobody does.
  """
  if len(row['index']) == 2 and row['weight'] > 0:
    return [row['index'][0]], [row['index'][1]]
  return [-1], [-1]


def _line(row):
  """A table of the candidates: reward, mean log-probability, push, and the other reward."""
  push = dict(zip(row['index'].tolist(), row['push'].tolist()))

  def mean(j):
    return float(row['logps'][j][row['mask'][j]].mean()) if row['mask'][j].any() else 0.0

  cells = [
    (
      f'candidate {j}',
      float(row['rewards'][j]),
      mean(j),
      f'{push[j]:+.4f}' if j in push else '',
      *([] if row['other'] is None else [float(row['other'][j])]),
    )
    for j in range(len(row['rewards']))
  ]
  head = ('', 'reward', 'mean log p', 'push', *([] if row['other'] is None else ['other reward']))
  title = f'Input {row["input"]}: {row["share"]:+.3f} of the gradient' + (
    '' if row['weight'] > 0 else ', dropped (equal rewards)'
  )
  return page_lib.table(title, head, cells)


def _picture_input(row):
  chosen, rejected = _verdicts(row)
  sheet = pictures_lib.candidates(
    [row['prompt']], row['pixels'][None], row['rewards'][None], chosen, rejected
  )
  heats = ''.join(
    page_lib.picture(page_lib.patches(row['pixels'][j], row['logps'][j] - row['logps'].mean()))
    for j in row['index'][:2]
  )
  note = 'The first two that learn, with the log-probability of each code above (green) or below the mean of the group.'
  return (
    _line(row)
    + page_lib.figure(pictures_lib.png(sheet), row['prompt'])
    + f'<p class="lead">{note}</p><div class="row">{heats}</div>'
  )


def _text_input(row):
  chosen, rejected = _verdicts(row)
  sheet = pictures_lib.captions(
    row['pixels'][None], [row['texts']], row['rewards'][None], chosen, rejected
  )
  words = ''.join(
    f'<p class="lead">candidate {j}</p>'
    + page_lib.heat(
      [
        (token, float(logp) / 2, False, f'{logp:.1f}')
        for token, logp in zip(row['tokens'][j], row['logps'][j][row['mask'][j]])
      ]
    )
    for j in row['index'][:2]
  )
  return (
    _line(row)
    + page_lib.figure(pictures_lib.png(sheet), f'Picture {row["input"]}')
    + f'<p class="lead">Log-probability of each token of the first two that learn.</p>{words}'
  )
