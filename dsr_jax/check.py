"""Checks that a model runs on this machine, and that it agrees with transformers. Prints one JSON
object on stdout, to paste into an issue.

  python -m dsr_jax.check --model=deepseek-community/Janus-Pro-1B --output=check

Draws one guided image greedily, and reports time and memory. If torch is installed, loads the same
directory with transformers in float32 and compares the ids of 20 prompts with their template, the
log-probabilities of a text given the image and of the image's codes given the text, and the first
16 greedy codes. --output also writes the JSON and the image to a folder. Exit status: 0; 1 if
something differs; 2 for bad input.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import sys
import time

from absl import flags
import jax
import numpy as np
import transformers

from dsr_jax import __version__, api, cli, families, files, flag_types
from dsr_jax.convert import configs, locate
from dsr_jax.errors import first_line
from dsr_jax.inference import Inference
from dsr_jax.models.janus.processor import ASSISTANT, BOI, USER

PROMPT = 'a photo of a red apple on a wooden table'
PROMPTS = (
  PROMPT,
  'a red disc',
  'a red disc left of a blue square',
  'two blue rings',
  'A photo of a bench',
  'a cat, a dog, and a bird',
  'the number 42 on a green door',
  'a 3D render of 1,000 tiny cubes',
  "a painter's studio at night",
  'rain; fog; snow',
  'a close-up (macro) of a bee',
  'an ultra-wide view of the Alps, 35 mm',
  'a café in Zürich',
  'ein roter Kreis',
  '一只红色的苹果',
  'a smiling emoji 🙂 on a mug',
  'a  picture   with   many    blanks',
  'ALL CAPITALS',
  'a sign that says "OPEN"',
  'a long description of a small house with a red roof, a blue door, two windows, a garden with '
  'flowers, a wooden fence, a gravel path, and a cat that sleeps in the sun',
)
GREEDY = 16  # codes that are compared
TOLERANCE = 1e-3  # nats, of float32 log-probabilities
PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'transformers', 'torch')
OUTPUTS = ('check.json', 'check.png')
MB = 1e6


def check(name: str, base: str = '', compare: bool = True) -> tuple[dict, api.Drawing]:
  """The JSON that `dsr_jax.check` prints, and the image.

  name, base: see `locate.resolve`. compare: whether to compare with transformers, if possible.

  Raises InputError if there is no such model.
  """
  # Load the model and draw: the first image includes compiling, the second does not.
  began = time.perf_counter()
  located = locate.locate(name, base)
  source = locate.resolve(name, base=base)
  inference = Inference(source)
  model = api.Model(inference)
  seconds = {'load': _since(began)}
  for which in ('first_picture', 'picture'):
    began = time.perf_counter()
    (drawing,) = model.generate(PROMPT, num_samples=1, temperature=0.0)
    seconds[which] = _since(began)

  family = families.family_of(source.bundle.config)
  result = {
    'dsr_jax': __version__,
    'python': platform.python_version(),
    'system': platform.platform(),
    'packages': {package: _version(package) for package in PACKAGES},
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'model': {
      'name': name,
      'fingerprint': source.bundle.source['hash'],
      'family': family.name,
      'image_size': inference.spec.image_size,
      'codes': inference.spec.num_codes,
      'parameters': sum(x.size for x in jax.tree.leaves(source.bundle.params)),
      'guidance': source.method.guidance,
    },
    'seconds': seconds,
    'megabytes': _megabytes(source.bundle.params),
    'picture': {
      'prompt': PROMPT,
      'reward_generation': drawing.reward_generation,
      'reward_understanding': drawing.reward_understanding,
      'first_codes': drawing.codes[:GREEDY].tolist(),
    },
  }
  reason = _why_not(located, family) if compare else '--nocompare'
  if reason:
    result['transformers'] = {'compared': False, 'reason': reason}
  else:
    result['transformers'] = _compare(located.directory, inference, drawing)
  return result, drawing


def _since(began: float) -> float:
  return round(time.perf_counter() - began, 3)


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _megabytes(params) -> dict:
  """Memory of the parameters and the peak of this process so far; also the device's own peak if JAX
  reports it.
  """
  found = {'parameters': sum(x.nbytes for x in jax.tree.leaves(params)) / MB}
  unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, in bytes
  found['process_peak'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    found['device_peak'] = stats['peak_bytes_in_use'] / MB
  return {name: round(value) for name, value in found.items()}


# Comparison with transformers.


def _why_not(located: locate.Located, family) -> str:
  """Why this model cannot be compared; '' if it can."""
  if importlib.util.find_spec('torch') is None:
    return 'torch is not installed'
  if located.workdir:
    return 'this is a run: export it with dsr convert --format=hf, then check that directory'
  if family.name != 'Janus':
    return f'models of the family {family.name} are not compared with transformers'
  content = files.read_json(os.path.join(located.directory, 'config.json'))
  if configs.layout_of(content) != 'hf':
    return 'transformers does not read the original layout: use dsr convert --format=hf'
  return ''


def _compare(directory: str, inference: Inference, drawing: api.Drawing) -> dict:
  """Compares the ids, log-probabilities and greedy codes of transformers with ours."""
  cli.log('comparing with transformers, in float32')
  transformers.utils.logging.disable_progress_bar()
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    theirs = transformers.JanusForConditionalGeneration.from_pretrained(directory, dtype='float32')
  except Exception as e:  # transformers may reject files that we can read, in any way
    return {'compared': False, 'reason': f'transformers cannot load it: {first_line(e)}'}
  processor, templates = inference.processor, inference.config.templates

  def with_template(text):
    return [
      *templates.generation_prefix,
      *processor.encode_prompt(text),
      *templates.generation_suffix,
    ]

  # The template as text, through their tokenizer.
  other_ids = [
    text
    for text in PROMPTS
    if tokenizer(f'{USER}: {text.strip()}\n\n{ASSISTANT}:{BOI}')['input_ids'] != with_template(text)
  ]

  # Both likelihoods of the image and its prompt; the drawn pixels before rounding.
  text = inference.encode(PROMPT, 'text')
  instruction = inference.encode(inference.source.method.instruction, 'question')
  pixels = inference.decode(drawing.codes)
  ours = inference.score(text, drawing.codes, pixels, instruction)
  them = _Theirs(theirs.eval(), templates)
  differences = {
    'text': np.abs(ours.text_logps - them.text_logps(text, instruction, pixels)),
    'codes': np.abs(ours.image_logps - them.code_logps(with_template(PROMPT), drawing.codes)),
  }
  largest = {name: float(found.max()) for name, found in differences.items()}
  codes = them.greedy_codes(with_template(PROMPT), inference.source.method.guidance, GREEDY)
  equal = int(np.sum(np.array(codes) == drawing.codes[:GREEDY]))
  return {
    'compared': True,
    'agrees': not other_ids and equal == len(codes) and max(largest.values()) <= TOLERANCE,
    'prompts_with_equal_ids': f'{len(PROMPTS) - len(other_ids)} of {len(PROMPTS)}',
    'prompts_with_other_ids': other_ids,
    'largest_difference_of_log_probabilities': largest,
    'greedy_codes_equal': f'{equal} of {len(codes)}',
    'greedy_codes': codes,
  }


class _Theirs:
  """A transformers model that computes the same quantities as ours; prompts and texts are ids.

  transformers has imported torch by the time such a model is loaded.
  """

  def __init__(self, model, templates):
    self._model = model
    self._templates = templates
    self._torch = sys.modules['torch']

  def text_logps(self, text, instruction, pixels) -> np.ndarray:
    """Log-probabilities of a text (T,) about an image (H, W, 3)."""
    torch, t = self._torch, self._templates
    patches = self._model.config.vision_config.num_image_tokens
    before = [*t.understanding_prefix, *[t.image_id] * patches, *t.understanding_infix]
    ids = [*before, *instruction, *t.understanding_suffix, *text]
    with torch.no_grad():
      logits = self._model(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()),
      ).logits[0, -len(text) - 1 : -1]
    logits[:, list(t.forbidden_text_ids)] = -torch.inf  # never sampled in texts
    return self._logps_of(logits, text)

  def code_logps(self, prompt, codes) -> np.ndarray:
    """Log-probabilities of an image's codes (N,), without guidance."""
    with self._torch.no_grad():
      logits = self._code_logits([prompt], codes[None, :-1])[0]
    return self._logps_of(logits, codes)

  def greedy_codes(self, prompt, guidance: float, number: int) -> list[int]:
    """The first greedy codes of an image; recomputes the whole sequence for each code."""
    t = self._templates
    kept = (t.bos_id, t.boi_id)
    without = [i if i in kept else t.pad_id for i in prompt]
    codes = np.zeros((2, 0), np.int64)
    for _ in range(number):
      with self._torch.no_grad():
        logits, unconditional = self._code_logits([prompt, without], codes)[:, -1]
      code = int((unconditional + guidance * (logits - unconditional)).argmax())
      codes = np.concatenate([codes, np.full((2, 1), code)], axis=1)
    return codes[0].tolist()

  def _code_logits(self, prompts, codes):
    """Prompts of equal length, codes (B, n) -> logits of the codes after them (B, n + 1, K)."""
    torch, model = self._torch, self._model
    embeds = model.get_input_embeddings()(torch.tensor(prompts))
    if codes.shape[1]:
      codes = torch.from_numpy(codes.astype(np.int64))
      embeds = torch.cat([embeds, model.prepare_embeddings_for_image_generation(codes)], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    return model.model.generation_head(hidden[:, len(prompts[0]) - 1 :])

  def _logps_of(self, logits, targets) -> np.ndarray:
    logps = self._torch.log_softmax(logits.double(), -1).numpy()
    return logps[np.arange(len(targets)), np.asarray(targets)]


# The command.


def main(argv, f=flags.FLAGS):
  """Prints the JSON; returns 1 if transformers disagrees."""
  cli.no_arguments(argv)
  cli.require(model=f.model)
  if f.output:
    files.check_output(f.output, lambda name: name in OUTPUTS)
  cli.log(f'loading {f.model}')
  result, drawing = check(f.model, f.base, f.compare)
  if f.output:
    with files.whole_directory(f.output) as aside:
      path = os.path.join(aside, 'check.json')
      files.write_json(path, result, ensure_ascii=False, indent=2, allow_nan=False)
      drawing.image.save(os.path.join(aside, 'check.png'))
  cli.print_json(result, kept=f.output or '')
  return int(result['transformers'].get('agrees') is False)


def define_flags(f=flags.FLAGS):
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_base_flag(f)
  flag_types.define_path(
    'output',
    None,
    'Output folder for the JSON and the image: new, empty, or an earlier output of this command. '
    'By default, only print the JSON.',
    f,
  )
  flags.DEFINE_boolean(
    'compare',
    True,
    'Compare with transformers if torch is installed. This needs another four bytes of memory per '
    'parameter.',
    flag_values=f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
