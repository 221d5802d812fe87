"""Describes a picture in words, best first by the model's own reward R_U. JSON on stdout.

  python -m dsr_jax.describe --model=scenes --image=picture.png --num_samples=4

A question may be asked instead of the description (--question). With --compare=MODEL2 the second
model speaks with the same seeds, under the key `compare`.
"""

from absl import flags

from dsr_jax import api, cli, inputs
from dsr_jax.convert import locate
from dsr_jax.errors import InputError, run_main
from dsr_jax.inference import Inference


def describe(
  model: Inference,
  image: str,
  *,
  question: str = '',
  num_samples: int = 4,
  temperature: float = 1.0,
  seed: int = 42,
  max_tokens: int | None = None,
) -> list[dict]:
  """Texts about an image file, best first; an empty text has no reward and comes last."""
  described = api.Model(model).describe(
    image,
    num_samples=num_samples,
    question=question or None,
    seed=seed,
    temperature=temperature,
    max_tokens=max_tokens,
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
    raise InputError('found an empty question; expected a text; write one, or leave --question out')
  cli.check_sampling(f.num_samples, f.temperature, f.seed)
  if f.max_tokens is not None and f.max_tokens < 1:
    raise InputError(f'found --max_tokens={f.max_tokens}; expected at least 1; raise it')
  result = {'image': f.image, 'temperature': f.temperature, 'seed': f.seed}
  for name in (f.model, *([f.compare] if f.compare else [])):
    cli.log(f'loading {name}')
    model = Inference(locate.resolve(name))
    question = f.question or result.get('question') or model.source.method.question
    cli.log(f'describing {inputs.shown(f.image)}: {question}')
    samples = describe(
      model,
      f.image,
      question=question,
      num_samples=f.num_samples,
      temperature=f.temperature,
      seed=f.seed,
      max_tokens=f.max_tokens,
    )
    table = {'model': name, 'samples': samples}
    if 'samples' in result:
      result['compare'] = table
    else:
      result |= {'question': question, **table}
  cli.print_json(result)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('model', None, f'The model: {locate.EXPECTED}.', flag_values=f)
  flags.DEFINE_string('image', None, 'A picture file.', flag_values=f)
  flags.DEFINE_string(
    'question',
    None,
    'What to ask about the picture. By default the question that the model was reinforced with.',
    flag_values=f,
  )
  flags.DEFINE_integer('num_samples', 4, 'How many texts.', flag_values=f)
  flags.DEFINE_integer(
    'max_tokens',
    None,
    'Longest text. By default what the model was reinforced with.',
    flag_values=f,
  )
  flags.DEFINE_float('temperature', 1.0, 'Sampling temperature; 0 is greedy.', flag_values=f)
  flags.DEFINE_integer(
    'seed', 42, 'Text i of every model is sampled with (seed, i).', flag_values=f
  )
  flags.DEFINE_string(
    'compare', None, 'A second model, which speaks with the same seeds.', flag_values=f
  )


if __name__ == '__main__':
  define_flags()
  run_main(main)
