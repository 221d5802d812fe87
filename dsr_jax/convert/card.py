"""The model card: how to use the model, its origin, its training, and the results.

The Hub reads the header. The snippets run unchanged in the directory of the card or, if it was
pushed, anywhere.
"""

import json
import os
import pathlib
import re
from typing import NamedTuple

import huggingface_hub

from dsr_jax import inputs, saved_config
from dsr_jax.convert import sidefiles
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Family

METHOD = 'dual self-rewards (https://arxiv.org/abs/2506.07963)'
PICTURE = 'before_after.png'
SIMPO = ('simpo', 'simpo_linear')
WHOLE_GROUPS = ('grpo', 'dr_grpo', 'rloo', 'gspo', 'cispo')
# Settings (or groups) that matter only for one choice -> whether the run made that choice.
APPLIES = {
  'beta': lambda m: m.objective in SIMPO,
  'gamma': lambda m: m.objective in SIMPO,
  'grpo': lambda m: m.objective in ('grpo', 'dr_grpo', 'rloo'),
  'gspo': lambda m: m.objective == 'gspo',
  'cispo': lambda m: m.objective == 'cispo',
  'dpo': lambda m: m.objective == 'online_dpo',
  'inner_updates': lambda m: m.objective in WHOLE_GROUPS,
  'kl': lambda m: m.objective in WHOLE_GROUPS,
  'kl_estimator': lambda m: m.objective in WHOLE_GROUPS and m.kl > 0,
  'min_margin': lambda m: m.objective not in WHOLE_GROUPS,
  'lora': lambda m: m.trainable == 'lora',
  'learning_rate': lambda m: m.trainable != 'lora',
  'separate': lambda m: m.strategy == 'separate',
  'ema_decay': lambda m: m.scorer == 'ema',
  'judge_accuracy': lambda m: bool({'judge', 'judge_strict'} & set(_terms(m))),
  'clip_reward': lambda m: 'clip' in _terms(m),
  'external_reward': lambda m: 'external' in _terms(m),
  'yes_question': lambda m: 'vqa' in _terms(m),
  'instruction': lambda m: 'generation' in m.tasks,
  'eos_in_reward': lambda m: 'generation' in m.tasks,
  'guidance': lambda m: 'generation' in m.tasks,
  'credit': lambda m: 'generation' in m.tasks,
  'cfg_interval': lambda m: 'generation' in m.tasks,
  'policy_guidance': lambda m: 'generation' in m.tasks,
  'question': lambda m: 'understanding' in m.tasks,
  'crop': lambda m: 'understanding' in m.tasks,
  'max_text_tokens': lambda m: 'understanding' in m.tasks,
  # Only for models that draw by unmasking, which have a number of steps.
  'picture_likelihood': lambda m: m.sampling_steps > 0,
  'elbo_draws': lambda m: m.sampling_steps > 0 and m.picture_likelihood == 'elbo',
  'prompt_drop': lambda m: m.sampling_steps > 0,
  'prompt_drop_way': lambda m: m.sampling_steps > 0 and m.prompt_drop > 0,
  'sampling_steps': lambda m: m.sampling_steps > 0,
  'sampling_noise': lambda m: m.sampling_steps > 0,
}

DRAW = """import torch
from PIL import Image
from transformers import JanusForConditionalGeneration, JanusProcessor

name = '{name}'{where}
processor = JanusProcessor.from_pretrained({processor})
model = {model}

# Draw.
words = [{{'type': 'text', 'text': 'a red disc left of a blue square'}}]
prompt = processor.apply_chat_template(
  [{{'role': 'user', 'content': words}}], add_generation_prompt=True
)
inputs = processor(text=prompt, generation_mode='image', return_tensors='pt')
torch.manual_seed(42)
codes = model.generate(**inputs, generation_mode='image', do_sample=True)
with torch.no_grad():
  pixels = model.decode_image_tokens(codes)[0].clamp(-1, 1)
picture = Image.fromarray(((pixels * 0.5 + 0.5) * 255).byte().numpy())
picture.save('picture.png')

# Describe.
words = [{{'type': 'image', 'image': picture}}, {{'type': 'text', 'text': '{question}'}}]
prompt = processor.apply_chat_template(
  [{{'role': 'user', 'content': words}}], add_generation_prompt=True
)
inputs = processor(text=prompt, images=[picture], generation_mode='text', return_tensors='pt')
ids = model.generate(**inputs, generation_mode='text', max_new_tokens=64, do_sample=False)
answer = ids[0, inputs['input_ids'].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""
PLAIN = 'JanusForConditionalGeneration.from_pretrained(name).eval()'
ADAPTED = """PeftModel.from_pretrained(
  JanusForConditionalGeneration.from_pretrained(base), name
).eval().base_model.model"""


class Card(NamedTuple):
  """README.md of an export and its images.

  text: the file. pictures {name: bytes}: image files in the same directory.
  """

  text: str
  pictures: dict[str, bytes]


def make(located, layout: str, family: Family, zeros=(), repository: str = '') -> Card:
  """The card of an export.

  Args:
    located: `locate.Located`.
    layout: layout of the card's directory; 'peft' for adapters only.
    family: of the model.
    zeros: tensors that the source does not have and that were written as zeros.
    repository: its future repository on the Hub; '' for none.
  """
  about = located.about
  base = about['model']['name'] if about else located.name
  title = repository.partition('/')[2] or pathlib.Path(base).name
  title += ', reinforced with its own rewards' if about and not repository else ''
  summary = _summary(located)
  pictures = _pictures(located)

  lines = [f'# {title}', '', f'{sidefiles.READERS[layout]} Written by dsr_jax.', '']
  if pictures:
    lines += [
      f'![The same prompts with the same random numbers, before and after]({PICTURE})',
      '',
      'The same prompts and pictures with the same random numbers, before and after.',
      '',
    ]
  if family is JANUS:  # no library of its own reads a Show-o
    lines += _usage(layout, base, repository, about)
  lines += _source(located, base)
  if zeros:
    lines += [
      f'{len(zeros)} tensors that the source does not have, and that no forward pass reads, are '
      f'zeros: {", ".join(zeros)}.',
      '',
    ]
  if about:
    lines += _method(about)
  lines += _results(summary)
  lines += ['## License', '', 'The weights are under the license of the model they come from.']
  header = _header(layout, family, base, title, summary, pictures, _licence(located))
  return Card(f'---\n{header}\n---\n\n' + '\n'.join(lines) + '\n', pictures)


# The header.


def _header(layout, family, base, title, summary, pictures, licence) -> str:
  library = 'peft' if layout == 'peft' else next(iter(sidefiles.LIBRARIES.get(layout, ())), None)
  more = dict(licence)
  if _is_on_the_hub(base):
    more['base_model'] = base
    more['base_model_relation'] = 'adapter' if layout == 'peft' else 'finetune'
  if pictures:
    more['widget'] = [{'text': 'before and after', 'output': {'url': PICTURE}}]
  results = [
    huggingface_hub.EvalResult(
      task_type='any-to-any',
      dataset_type='own',
      dataset_name="the run's fixed lists",
      metric_type=score,
      metric_value=round(row['after'], 6),
    )
    for score, row in summary.get('evaluation', {}).items()
    if row.get('after') is not None
  ]
  if results:
    more |= {'model_name': title, 'eval_results': results}
  data = huggingface_hub.ModelCardData(
    library_name=library, pipeline_tag='any-to-any', tags=[family.name.lower(), 'dsr_jax'], **more
  )
  return data.to_yaml()


def _licence(located) -> dict:
  """The license fields in the header of the source's own card."""
  path = pathlib.Path(located.directory) / 'README.md'
  if not path.is_file():
    return {}
  text = path.read_text(encoding='utf-8', errors='replace')
  header = re.match(r'---\n(.*?)\n---', text, re.DOTALL)
  found = re.findall(r'^(license\w*):[ \t]*(\S.*?)[ \t]*$', header[1], re.M) if header else []
  return {key: value.strip('\'"') for key, value in found}


def _is_on_the_hub(name: str) -> bool:
  return inputs.is_hub_id(name) and not os.path.exists(name)


# The body.


def _usage(layout, base, repository, about) -> list[str]:
  """How to use it, if a library reads this layout."""
  if layout not in ('hf', 'peft'):
    return []
  method = saved_config.saved_method(about['method']) if about else None
  question = method.question if method else 'Describe this image in detail.'
  name, where = (repository, '') if repository else ('.', '  # the directory of this card')
  text = DRAW.format(
    name=name,
    where=where,
    processor='base' if layout == 'peft' else 'name',
    model=ADAPTED if layout == 'peft' else PLAIN,
    question=question.replace('\\', '\\\\').replace("'", "\\'").replace('\n', '\\n'),
  )
  if layout == 'peft':
    shown = base if _is_on_the_hub(base) else f'DIRECTORY_OF_{pathlib.Path(base).name}'
    text = text.replace('import torch\n', 'import torch\nfrom peft import PeftModel\n', 1)
    text = text.replace("\nname = '", f"\nbase = '{shown}'\nname = '", 1)
  return ['## Use', '', '```python', *text.rstrip().splitlines(), '```', '']


def _source(located, base) -> list[str]:
  lines = ['## Source', '', f'- model: {_shown(base)}']
  if located.about:
    lines += [
      f'- sha256 of its weights: {located.about["model"]["fingerprint"]}',
      f'- step of the run: {located.step}',
    ]
  return [*lines, '']


def _method(about) -> list[str]:
  """The settings that mattered in this run."""
  saved = saved_config.of_run(about['method'])
  method = saved_config.saved_method(about['method'])
  lines = ['## Method', '', f'Reinforced with {METHOD}.', '', '| setting | value |', '|---|---|']
  for key, value in saved_config.flat(saved).items():
    applies = APPLIES.get(key.partition('.')[0])
    if (applies is None or applies(method)) and value != '':
      lines.append(f'| {key} | {_cell(value)} |')
  lines += ['', '## Data', '', '| setting | value |', '|---|---|']
  lines += [f'| {key} | {_cell(value)} |' for key, value in about['data'].items()]
  return [*lines, '']


def _summary(located) -> dict:
  """summary.json, which a run writes at its end, if it describes exactly this step."""
  if not located.workdir:
    return {}
  try:
    text = (pathlib.Path(located.workdir) / 'summary.json').read_text(encoding='utf-8')
    summary = json.loads(text)
    rows = {
      name: {side: row.get(side) for side in ('before', 'after')}
      for name, row in summary['evaluation'].items()
    }
  except (OSError, ValueError, KeyError, AttributeError):
    return {}
  if summary.get('step') != located.step:
    return {}
  return {'step': summary['step'], 'steps': summary.get('steps'), 'evaluation': rows}


def _results(summary) -> list[str]:
  if not summary:
    return []
  lines = [
    '## Results',
    '',
    f'After {summary["step"]} of {summary["steps"]} steps of the run, on its fixed lists, the same '
    'items before and after; rewards are in nats per token.',
    '',
    '| score | before | after |',
    '|---|---:|---:|',
  ]
  for name, row in summary['evaluation'].items():
    lines.append(f'| {name} | {_number(row["before"])} | {_number(row["after"])} |')
  return [*lines, '']


def _pictures(located) -> dict[str, bytes]:
  """The fixed list's sheets from the initial model and from this step's model, if they exist."""
  if not located.workdir:
    return {}
  path = pathlib.Path(located.workdir) / 'watched' / f'{located.step:06d}.png'
  return {PICTURE: path.read_bytes()} if path.is_file() else {}


def _terms(method) -> list[str]:
  return [part.rpartition('*')[2].strip() for part in method.reward.split('+')]


def _shown(name):
  """A Hub id unchanged, or the last part of a path: readers of the card do not have the path."""
  return name if not pathlib.Path(name).exists() else pathlib.Path(name).name


def _cell(value):
  text = _shown(value) if isinstance(value, str) and value else str(value)
  return text.replace('|', '\\|').replace('\n', ' ')


def _number(value):
  return '' if value is None else f'{value:.4f}'
