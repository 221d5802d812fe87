"""Describes an image in words, ranked by the model's own reward R_U. Prints JSON on stdout.

  python -m dsr_jax.describe --model=scenes --image=picture.png --num_samples=4

--question asks a question instead. With --compare=MODEL2, a second model samples with the same
seeds; its results are under the key `compare`.
"""

from absl import flags

from dsr_jax import api, cli, flag_types, inputs
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.inference import Inference


def describe(
  model: Inference,
  image: str,
  *,
  question: str = '',
  num_samples: int = 4,
  temperature: float | None = None,
  seed: int = 42,
  max_tokens: int | None = None,
  crop: str = '',
) -> list[dict]:
  """Texts about an image file, best first; an empty text has no reward and comes last. An argument
  that is left out takes the model's own setting.
  """
  described = api.Model(model).describe(
    image,
    num_samples=num_samples,
    question=question or None,
    seed=seed,
    temperature=temperature,
    max_tokens=max_tokens,
    crop=crop or None,
  )
  return [
    {
      'text': text.text,
      'candidate': text.candidate,
      'reward_understanding': text.reward_understanding,
      'reward_generation': text.reward_generation,
      'ended': text.ended,
      'text_tokens': text.text_tokens,
      'sampling_logps': cli.rounded(text.sampling_logps),
    }
    for text in described
  ]


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(model=f.model, image=f.image)
  inputs.check_text(question=f.question)
  if f.question and not f.question.strip():
    raise InputError('--question is empty; write a question, or leave --question out')
  cli.check_sampling(f.num_samples, 1.0 if f.temperature is None else f.temperature, f.seed)
  if f.max_tokens is not None:
    cli.check_range(1, 100_000, max_tokens=f.max_tokens)
  result = {}
  for name in (f.model, *([f.compare] if f.compare else [])):
    cli.log(f'loading {name}')
    base = locate.base_for(name, f.base, several=bool(f.compare))
    model = Inference(locate.resolve(name, template=f.template, base=base))
    # The second model gets the same question about the same image.
    method = model.source.method
    result = result or {
      'image': f.image,
      'temperature': method.temperature if f.temperature is None else f.temperature,
      'seed': f.seed,
      'crop': f.crop or method.crop,
      'question': f.question or method.question,
    }
    question = result['question']
    cli.log(f'describing {inputs.shown(f.image)}: {question}')
    samples = describe(
      model,
      f.image,
      question=question,
      num_samples=f.num_samples,
      temperature=result['temperature'],
      seed=f.seed,
      max_tokens=f.max_tokens,
      crop=result['crop'],
    )
    table = {'model': name, 'template': method.template, 'samples': samples}
    if 'samples' in result:
      result['compare'] = table
    else:
      result |= table
  cli.print_json(result)


def define_flags(f=flags.FLAGS):
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_flags(f)
  locate.define_crop_flag(f)
  flag_types.define_path('image', None, 'An image file.', f)
  flags.DEFINE_string(
    'question',
    None,
    'Question about the image. By default, the one that the model was trained with.',
    flag_values=f,
  )
  flags.DEFINE_integer('num_samples', 4, 'Number of texts.', flag_values=f)
  flags.DEFINE_integer(
    'max_tokens',
    None,
    'Maximum length of a text in tokens. By default, as in training.',
    flag_values=f,
  )
  flags.DEFINE_float(
    'temperature',
    None,
    'Sampling temperature; 0 is greedy. By default, the one used in training, else 1.',
    flag_values=f,
  )
  flags.DEFINE_integer('seed', 42, 'Sample i of every model uses the key (seed, i).', flag_values=f)
  flag_types.define_path('compare', None, 'A second model, which samples with the same seeds.', f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
