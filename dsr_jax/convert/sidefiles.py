"""Files of a model directory other than weights and config.json: tokenizer, processor, generation
settings, card.

Within a layout, they are copied unchanged. Between layouts, the tokenizer is copied, and the files
with class names and sizes are rewritten for the classes that will read them. Files that the source
lacks are also written if they follow from the rest: transformers 5 itself no longer writes
preprocessor_config.json but a section of processor_config.json.

Source: deepseek-ai/Janus janus/models/{processing_vlm,image_processing_vlm}.py; transformers'
processing_janus.py.
"""

import re
import shutil

from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing

from dsr_jax import files, images
from dsr_jax.convert import tokenizer_files
from dsr_jax.errors import InputError
from dsr_jax.models.janus.processor import BOI, BOS, EOI, EOS, IMAGE, PAD, SPECIALS

COMMON = (
  'tokenizer.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'tokenizer.model',
  'LICENSE',
  'LICENSE.md',
  'LICENSE.txt',
  'LICENSE-MODEL',
)
OWN = (
  'tokenizer_config.json',
  'processor_config.json',
  'preprocessor_config.json',
)  # each layout has its own content
FILES = COMMON + OWN + ('generation_config.json', 'chat_template.jinja', 'chat_template.json')
NEEDED = {
  'hf': ('tokenizer.json', 'processor_config.json'),
  'deepseek': ('tokenizer.json',),
}  # the rest follows from them
READERS = {
  'hf': '`transformers.JanusForConditionalGeneration.from_pretrained` reads this directory.',
  'deepseek': 'The `janus` package of https://github.com/deepseek-ai/Janus reads this directory.',
  'peft': '`peft` loads these adapters onto the model that they belong to.',
  'showo': 'The code of https://github.com/showlab/Show-o reads this directory, its image '
  'tokenizer from magvitv2/ and its text tokenizer from here.',
}
# The Hub's name of the library that reads a directory, by layout.
LIBRARIES = {'hf': ('transformers',), 'showo': ('diffusers',)}


def check(source, layout):
  """InputError unless the directory `source` has all side files that its layout needs."""
  lacking = [name for name in NEEDED[layout] if not (source / name).is_file()]
  if lacking:
    raise InputError(
      f'{source} lacks {", ".join(lacking)}; check the path, which should be a model directory '
      'with its tokenizer and processor files'
    )


def write(target, layout, source, source_layout, config, processor, guidance=None):
  """Writes all these files.

  Args:
    target, layout: the directory to write to, and its layout.
    source, source_layout: the directory to copy from, and its layout.
    config, processor: the model's `JanusConfig`, and the source's `Processor`.
    guidance: the guidance weight for generation_config.json; None keeps the source's, or
      Janus-Pro's.
  """
  for name in (*COMMON, 'generation_config.json') if layout != source_layout else FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
  make = _hugging_face if layout == 'hf' else _deepseek
  for name, content in make(source, config, processor).items():
    if not (target / name).is_file():
      files.write_json(target / name, content, indent=2, ensure_ascii=False)
  if layout == 'hf' and (source_layout != 'hf' or processor.template != 'tokens'):
    words = tokenizer_files.chat_template(processor.template)
    files.write_text(target / 'chat_template.jinja', words)
  if layout == 'hf' != source_layout:
    _ensure_bos(target / 'tokenizer.json')
  if guidance is not None:
    path = target / 'generation_config.json'
    settings = dict(files.read_json(path, default={}), guidance_scale=guidance)
    files.write_json(path, settings, indent=2, ensure_ascii=False)


def _hugging_face(source, config, processor):
  ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
  theirs = files.read_json(source / 'tokenizer_config.json', default={})
  contents = tokenizer_files.side_files(
    ids,
    config.image_size,
    config.vision.patch_size,
    processor.system_prompt,
    theirs.get('model_max_length', config.text.max_position_embeddings),
  )
  # tokenizer.json contains the tokens with their flags.
  del contents['tokenizer_config.json']['added_tokens_decoder']
  if 'image_processor' in files.read_json(source / 'processor_config.json', default={}):
    del contents['preprocessor_config.json']
  return contents


def _deepseek(source, config, processor):
  theirs = files.read_json(source / 'tokenizer_config.json', default={})
  tokenizer = dict(
    add_bos_token=True,
    add_eos_token=False,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    unk_token=None,
    clean_up_tokenization_spaces=False,
    model_max_length=theirs.get('model_max_length', 16384),
    tokenizer_class='LlamaTokenizerFast',
    processor_class='VLChatProcessor',
  )
  image = dict(
    background_color=list(images.GREY),
    do_normalize=True,
    image_mean=[0.5] * 3,
    image_processor_type='VLMImageProcessor',
    image_size=config.image_size,
    image_std=[0.5] * 3,
    min_size=images.MIN_SIDE,
    processor_class='VLChatProcessor',
    rescale_factor=1 / 255,
  )
  settings = dict(
    add_special_token=False,
    ignore_id=-100,
    image_tag=IMAGE,
    mask_prompt=True,
    num_image_tokens=config.vision.num_patches,
    processor_class='VLChatProcessor',
    sft_format='deepseek',
  )
  special = dict(
    bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE, BOI, EOI]
  )
  return {
    'tokenizer_config.json': tokenizer,
    'preprocessor_config.json': image,
    'processor_config.json': settings,
    'special_tokens_map.json': special,
  }


def _ensure_bos(path):
  """Makes tokenizer.json prepend the BOS token, if it left that to the class that reads it.

  transformers 5 reads only tokenizer.json; the original's LlamaTokenizerFast adds the token through
  its own setting.
  """
  tokenizer = Tokenizer.from_file(str(path))
  bos = tokenizer.token_to_id(BOS)
  if tokenizer.encode('a').ids[:1] == [bos]:
    return
  template = TemplateProcessing(
    single=f'{BOS} $A', pair=f'{BOS} $A {BOS} $B:1', special_tokens=[(BOS, bos)]
  )
  before = tokenizer.post_processor
  tokenizer.post_processor = Sequence([before, template]) if before else template
  tokenizer.save(str(path))


def write_card(target, layout, body, source_card=None):
  """Writes README.md: the header that the Hub reads, with the license from the source's card, then
  the body. A body with its own header is written unchanged.
  """
  if body.startswith('---\n'):
    files.write_text(target / 'README.md', body)
    return
  licence = []
  if source_card is not None and source_card.is_file():
    header = re.match(
      r'---\n(.*?)\n---', source_card.read_text(encoding='utf-8', errors='replace'), re.DOTALL
    )
    licence = re.findall(r'^license[^\n]*', header.group(1), re.MULTILINE) if header else []
  library = [f'library_name: {name}' for name in LIBRARIES.get(layout, ())]
  name = 'Show-o' if layout == 'showo' else 'Janus'
  tag = f'- {name.lower()}'
  header = '\n'.join(
    ['---', *licence, *library, 'pipeline_tag: any-to-any', 'tags:', tag, '---', '', '']
  )
  (target / 'README.md').write_text(
    header + (body or f'# {name}\n\nWritten by dsr_jax. {READERS[layout]}\n'), encoding='utf-8'
  )
