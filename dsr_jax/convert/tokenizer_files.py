"""Tokenizer and related files of a model directory, for a new model or a converted one.

tokenizer.json is trained on texts (`make_tokenizer`); the others give classes, sizes and ids to
readers of the directory (`side_files`).
"""

import pathlib

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  processors,
  trainers,
)

from dsr_jax import files, images
from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import ROLES
from dsr_jax.models.janus.processor import BOI, BOS, EOI, EOS, IMAGE, PAD, SPECIALS, Processor

# For the template `tokens`; `chat_template` handles all templates.
CHAT_TEMPLATE = (
  '{%- for message in messages -%}'
  "{%- if message['role'] == 'system' -%}"
  "{%- for part in message['content'] -%}{{- part['text'] | trim -}}{%- endfor -%}{{- '\\n\\n' -}}"
  '{%- else -%}'
  "{{- ('<|User|>' if message['role'] == 'user' else '<|Assistant|>') + ':' -}}"
  "{%- for part in message['content'] -%}"
  "{{- ' ' if loop.first else '\\n' -}}"
  "{{- '<image_placeholder>' if part['type'] == 'image' else part['text'] | trim -}}"
  '{%- endfor -%}'
  "{{- '\\n\\n' if message['role'] == 'user' else eos_token -}}"
  '{%- endif -%}'
  '{%- endfor -%}'
  "{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}"
)


def chat_template(template: str) -> str:
  """transformers' chat template with the words of a prompt template, a key of `ROLES`."""
  text = CHAT_TEMPLATE
  for token, role in zip(ROLES['tokens'], ROLES[template]):
    text = text.replace(token, role)
  return text


def make_tokenizer(
  texts,
  vocab_size,
  directory,
  *,
  image_size=32,
  patch_size=4,
  system_prompt=False,
  model_max_length=1024,
):
  """Trains a byte-level BPE tokenizer with Janus' special tokens and writes a model directory
  without the model.

  It writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
  processor_config.json, preprocessor_config.json and generation_config.json; `convert.save` writes
  config.json and the weights.

  Args:
    texts: iterable of strings to learn merges from.
    vocab_size: maximum number of tokens, including special ones (>= 264: 256 bytes and 8 special
      tokens).
    image_size, patch_size: pixels; the vision tower sees (image_size / patch_size)² tokens per
      image.
    system_prompt: whether understanding prompts begin with Janus' system prompt.
  Returns:
    The `Processor` of the new directory. The last eight ids are the special tokens.
  """
  if vocab_size < 256 + len(SPECIALS):
    raise InputError(
      f'vocab_size is {vocab_size}; raise it to at least {256 + len(SPECIALS)} (256 bytes and '
      f'{len(SPECIALS)} special tokens)'
    )
  tokenizer = train_bpe(texts, vocab_size - len(SPECIALS))
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
  )
  tokenizer.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=False),
      processors.TemplateProcessing(
        single=f'{BOS} $A',
        pair=f'{BOS} $A {BOS} $B:1',
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
      ),
    ]
  )
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / 'tokenizer.json'))
  ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
  contents = side_files(ids, image_size, patch_size, system_prompt, model_max_length)
  for name, content in contents.items():
    files.write_json(directory / name, content, indent=2, ensure_ascii=False)
  files.write_text(directory / 'chat_template.jinja', CHAT_TEMPLATE)
  return Processor.from_directory(directory)


def train_bpe(texts, vocab_size):
  """A byte-level BPE with at most `vocab_size` tokens, trained on texts, without special tokens."""
  tokenizer = Tokenizer(models.BPE())

  # Split as DeepSeek-LLM does: each line break alone, a space together with the word or mark after
  # it, digits one by one.
  def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), 'isolated')

  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      split(r'[\r\n]'),
      split(r'\s?\p{L}+'),
      split(r'\s?\p{P}+'),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  # Contents follow ':' or an image, so train with and without the leading space, as they will be
  # encoded.
  lines = [line for text in texts for line in (' ' + text.strip(), text.strip())]
  tokenizer.train_from_iterator(
    lines,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  return tokenizer


def side_files(ids, image_size, patch_size, system_prompt, model_max_length):
  """File name -> JSON content, for all files of the Hugging Face layout except tokenizer.json,
  config.json and the weights.

  ids: the ids of the `SPECIALS`, by their text. For the other arguments, see `make_tokenizer`.
  """
  tokens = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD)
  return {
    'tokenizer_config.json': dict(
      tokens,
      tokenizer_class='PreTrainedTokenizerFast',
      processor_class='JanusProcessor',
      add_bos_token=True,
      add_eos_token=False,
      padding_side='left',
      clean_up_tokenization_spaces=False,
      model_max_length=model_max_length,
      extra_special_tokens=dict(image_token=IMAGE, boi_token=BOI, eoi_token=EOI),
      added_tokens_decoder={
        str(i): dict(
          content=token,
          special=True,
          normalized=False,
          lstrip=False,
          rstrip=False,
          single_word=False,
        )
        for token, i in ids.items()
      },
    ),
    'special_tokens_map.json': dict(tokens, image_token=IMAGE, boi_token=BOI, eoi_token=EOI),
    'processor_config.json': dict(
      processor_class='JanusProcessor',
      num_image_tokens=(image_size // patch_size) ** 2,
      use_default_system_prompt=system_prompt,
    ),
    'preprocessor_config.json': dict(
      processor_class='JanusProcessor',
      image_processor_type='JanusImageProcessor',
      do_convert_rgb=True,
      do_resize=True,
      size=dict(height=image_size, width=image_size),
      min_size=images.MIN_SIDE,
      resample=3,
      do_rescale=True,
      rescale_factor=1 / 255,
      do_normalize=True,
      image_mean=[0.5] * 3,
      image_std=[0.5] * 3,
      do_pad=True,
      background_color=list(images.GREY),
    ),
    'generation_config.json': dict(
      bos_token_id=ids[BOS],
      eos_token_id=ids[EOS],
      pad_token_id=ids[PAD],
      guidance_scale=5,
      generation_kwargs=dict(boi_token_id=ids[BOI]),
    ),
  }
