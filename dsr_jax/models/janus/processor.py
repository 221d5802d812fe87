"""Text and pictures at the border: tokenizer, Janus' prompt templates, image loading and
preprocessing.

Everything here runs on the host in numpy and needs no model. Special tokens are found by their
literal string, because their ids differ between the 1B and the 7B checkpoint (the 1B pad is the 7B
letter row, and the other way round).

  H, W  picture height and width
  T     tokens
"""

import json
import pathlib

import numpy as np
from PIL import Image, ImageOps

from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import Templates

# Bars and blocks of the first three are U+FF5C and U+2581, not ASCII.
BOS = '<\uff5cbegin\u2581of\u2581sentence\uff5c>'
EOS = '<\uff5cend\u2581of\u2581sentence\uff5c>'
PAD = '<\uff5c\u2581pad\u2581\uff5c>'
BOI, EOI, IMAGE = '<begin_of_image>', '<end_of_image>', '<image_placeholder>'
USER, ASSISTANT = '<|User|>', '<|Assistant|>'
SPECIALS = (BOS, EOS, PAD, BOI, EOI, IMAGE, USER, ASSISTANT)

SYSTEM_PROMPT = (
  'You are a helpful language and vision assistant. You are able to understand the visual content '
  'that the user '
  'provides, and assist the user with a variety of tasks using natural language.\n\n'
)

MIN_SIDE = 14  # Janus never lets the short side of a padded picture fall below this
_GREY = (127, 127, 127)  # int(0.5 * 255), Janus' padding colour


class Processor:
  """Encodes and decodes texts for one model directory.

  Attributes:
    tokenizer: the transformers `PreTrainedTokenizerFast`.
    system_prompt: whether understanding prompts begin with Janus' system prompt.
    templates: the `Templates` the model's protocol methods splice around contents.
  """

  def __init__(self, tokenizer, vocab_size=None, system_prompt=False):
    """vocab_size: rows of the model's text embedding; ids beyond the tokenizer's last are never
    sampled.
    """
    self.tokenizer, self.system_prompt = tokenizer, system_prompt
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    added = tokenizer.added_tokens_decoder
    missing = [token for token, i in ids.items() if i is None or i not in added]
    if missing:
      raise InputError(
        f"found a tokenizer without the special tokens {missing}; expected all of Janus' "
        f'{list(SPECIALS)}; use the tokenizer that belongs to the checkpoint'
      )
    rows = vocab_size or len(tokenizer)
    if rows < len(tokenizer):
      raise InputError(
        f'found a model of {rows} text rows with a tokenizer of {len(tokenizer)} tokens; expected '
        'no '
        'more tokens than rows; use the tokenizer that belongs to the checkpoint'
      )
    # Janus' own tokens and every token marked special; DeepSeek also adds plain letters as tokens,
    # which stay allowed.
    self._special = frozenset(ids.values()) | {i for i, token in added.items() if token.special}
    self._ids = ids
    encode = self._encode
    user, assistant = encode(f'{USER}:'), encode(f'\n\n{ASSISTANT}:')
    head = [ids[BOS]] + (encode(SYSTEM_PROMPT) if system_prompt else [])
    self.templates = Templates(
      bos_id=ids[BOS],
      eos_id=ids[EOS],
      pad_id=ids[PAD],
      boi_id=ids[BOI],
      eoi_id=ids[EOI],
      image_id=ids[IMAGE],
      generation_prefix=tuple([ids[BOS]] + user),
      generation_suffix=tuple(assistant + [ids[BOI]]),
      understanding_prefix=tuple(head + encode(f'{USER}: ') + [ids[BOI]]),
      understanding_infix=tuple([ids[EOI]] + encode('\n')),
      understanding_suffix=tuple(assistant),
      forbidden_text_ids=tuple(
        sorted((self._special - {ids[EOS]}) | set(range(len(tokenizer), rows)))
      ),
    )

  @classmethod
  def from_directory(cls, directory, vocab_size=None):
    """Reads tokenizer.json, and, where they exist, processor_config.json and the row count in
    config.json.
    """
    directory = pathlib.Path(directory)
    # The file itself, not AutoTokenizer: a `LlamaTokenizer` named in tokenizer_config.json is
    # rebuilt by transformers 5
    # as a sentencepiece tokenizer, while Janus' is a byte-level BPE.
    tokenizer = _load_tokenizer(directory / 'tokenizer.json')
    settings = read_json(directory / 'processor_config.json', default={})
    config = read_json(directory / 'config.json', default={})
    if vocab_size is None:
      text = config.get('text_config') or config.get('language_config') or {}
      vocab_size = text.get('vocab_size')
    return cls(tokenizer, vocab_size, system_prompt=_has_system_prompt(settings, config))

  def encode_prompt(self, text, max_tokens=None):
    """Ids of a drawing prompt's content, with the leading space that the template expects."""
    return self._content(' ' + text.strip(), 'prompt', max_tokens)

  def encode_question(self, text, max_tokens=None):
    """Ids of a question's content (it follows a line break, so no leading space)."""
    return self._content(text.strip(), 'question', max_tokens)

  def encode_answer(self, text, max_tokens=None):
    """Ids of an answer with its leading space, and the end-of-sentence token."""
    return self._content(' ' + text.strip(), 'answer', max_tokens and max_tokens - 1) + [
      self.templates.eos_id
    ]

  def decode(self, ids):
    """The text of (T,) ids up to the first end of sentence: stripped, special tokens left out."""
    ids = [int(i) for i in ids]
    if self.templates.eos_id in ids:
      ids = ids[: ids.index(self.templates.eos_id)]
    ids = [i for i in ids if i not in self._special and i < len(self.tokenizer)]
    return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()

  def pad(self, sequences, length=None):
    """Left-justified `Text` of numpy (B, T): ids int32 filled with the pad id, mask True on
    content.

    T is `length`, or the longest sequence. Raises InputError where a sequence is longer than
    `length`.
    """
    longest = max((len(s) for s in sequences), default=0)
    length = longest if length is None else length
    if longest > length:
      raise InputError(
        f'found a text of {longest} tokens; expected at most {length}; shorten it or raise the '
        'limit'
      )
    ids = np.full((len(sequences), length), self.templates.pad_id, np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
      ids[row, : len(sequence)] = sequence
      mask[row, : len(sequence)] = True
    from dsr_jax.models.unified import Text

    return Text(ids, mask)

  def _encode(self, text):
    return list(self.tokenizer.encode(text, add_special_tokens=False))

  def _content(self, text, kind, max_tokens):
    """Ids of user text; template tokens inside it would change who speaks, so they are refused."""
    if not text.strip():
      raise InputError(f'found an empty {kind}; expected a text; write one')
    ids = self._encode(text)
    found = [i for i in ids if i in self._special]
    if found:
      token = self.tokenizer.convert_ids_to_tokens(found[0])
      raise InputError(
        f'found the special token {token} in the {kind} {text.strip()[:60]!r}; expected plain '
        'text; remove it'
      )
    if max_tokens is not None and len(ids) > max_tokens:
      raise InputError(
        f'found a {kind} of {len(ids)} tokens ({text.strip()[:60]!r}); expected at most '
        f'{max_tokens}; '
        'shorten it or raise the limit'
      )
    return ids


def read_json(path, default=None):
  """The object in a JSON file. A missing file gives `default` if there is one; everything else is
  an InputError.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    if default is not None:
      return default
    raise InputError(
      f'found no {path.name} in {path.parent}; expected a model directory; check the path'
    )
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError) as e:
    raise InputError(f'found {path} unreadable ({e}); expected JSON; fetch the file again') from e
  if not isinstance(content, dict):
    raise InputError(
      f'found a {type(content).__name__} in {path}; expected a JSON object; fetch the file again'
    )
  return content


def _has_system_prompt(settings, config):
  """Whether understanding prompts begin with the system prompt. settings, config:
  processor_config.json, config.json.
  """
  if (
    settings.get('processor_class') == 'VLChatProcessor'
    or config.get('model_type') == 'multi_modality'
  ):
    return bool(
      (config.get('dsr_jax') or {}).get('system_prompt', True)
    )  # the original's processor always has it
  return bool(settings.get('use_default_system_prompt'))


def _load_tokenizer(path):
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast  # a second of imports, so not at the top

  if not path.is_file():
    raise InputError(
      f'found no {path.name} in {path.parent}; expected a model directory with its tokenizer; '
      'check the path'
    )
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as e:  # the Rust side raises bare Exception
    raise InputError(
      f'found {path} unreadable ({e}); expected a tokenizer.json; fetch the file again'
    ) from e
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    padding_side='left',
    clean_up_tokenization_spaces=False,
  )


# Pictures.


def load_image(source):
  """An RGB PIL image from a path, an open file or a PIL image of any mode.

  16-bit grey is scaled to 8 bits, transparency is laid over white, the EXIF rotation is applied.
  Raises InputError for what does not decode.
  """
  try:
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image.load()  # open() reads the header only; a truncated file fails here
    image = ImageOps.exif_transpose(image)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise InputError(
      f'found {source} unreadable as a picture ({e}); expected a PNG or JPEG file; '
      'check the path or save the picture again'
    ) from e
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    return _from_deep(image).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    ground = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(ground, image).convert('RGB')
  return image.convert('RGB')


def _from_deep(image):
  """An 8-bit grey image from a 16-bit one (PIL's own conversion clips everything above 255 to
  white).
  """
  values = np.asarray(image).astype(np.float64)
  if image.mode != 'F':
    values /= 257  # 65535 -> 255
  elif values.size and values.max() <= 1:
    values *= 255
  return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def preprocess(image, size, mode='crop', rounding='int'):
  """Makes a picture square: uint8 (size, size, 3).

  Args:
    image: what `load_image` takes.
    mode: 'crop' scales the short side to `size` and cuts the centre out of the long one (how Janus
      saw pictures it learned to draw); 'pad' scales the long side and pads with grey (how it saw
      pictures it learned to describe).
    rounding: of the other side's length; 'int' truncates as the original code does, 'round' is what
      transformers has done since 5.0. They differ by one pixel for about half of all sizes.
  """
  if mode not in ('crop', 'pad'):
    raise InputError(f'found picture mode {mode!r}; expected crop or pad; choose one')
  if rounding not in ('int', 'round'):
    raise InputError(f'found rounding {rounding!r}; expected int or round; choose one')
  whole = int if rounding == 'int' else round
  image = load_image(image)
  if mode == 'crop':
    return _crop(image, size, whole)
  width, height = image.size
  longest = max(width, height)
  # Each in the order its source multiplies: the products differ in the last bit, and truncation
  # makes that a pixel.
  scaled = (
    (lambda side: side / longest * size)
    if rounding == 'int'
    else (lambda side: side * (size / longest))
  )
  shape = tuple(min(max(whole(scaled(side)), MIN_SIDE), size) for side in (width, height))
  canvas = Image.new('RGB', (size, size), _GREY)
  canvas.paste(
    image.resize(shape, Image.Resampling.BICUBIC), ((size - shape[0]) // 2, (size - shape[1]) // 2)
  )
  return np.asarray(canvas)


def _crop(image, size, whole):
  """Scales the short side to `size` and cuts the centre, in one resampling: a 1 x 1000 picture is
  never blown up.
  """
  shortest = min(image.size)
  box = []
  for side in image.size:
    scaled = max(whole(side * size / shortest), size)
    offset = (scaled - size) // 2
    box.append((offset * side / scaled, min((offset + size) * side / scaled, side)))
  (left, right), (top, bottom) = box
  return np.asarray(
    image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
  )


def to_float(picture):
  """uint8 (..., H, W, 3) -> float32 in [-1, 1]."""
  return np.asarray(picture, np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(pixels):
  """Pixels in [-1, 1], (..., H, W, 3) -> uint8; truncated, not rounded, as Janus and transformers
  do.
  """
  return np.clip((np.asarray(pixels, np.float32) * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8)


# Making a tokenizer for a new model.

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
  """Trains a byte-level BPE tokenizer with Janus' special tokens and writes all of a model
  directory but the model.

  That is tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
  processor_config.json, preprocessor_config.json and generation_config.json; config.json and the
  weights are `convert.save`'s.

  Args:
    texts: iterable of strings to learn merges from.
    vocab_size: at most so many tokens, special ones included (>= 264: 256 bytes and 8 special
      tokens).
    image_size, patch_size: pixels; the vision tower sees (image_size / patch_size)² tokens a
      picture.
    system_prompt: whether understanding prompts begin with Janus' system prompt.
  Returns:
    The `Processor` of the new directory. The last eight ids are the special tokens.
  """
  from tokenizers import AddedToken

  if vocab_size < 256 + len(SPECIALS):
    raise InputError(
      f'found vocab_size {vocab_size}; expected at least {256 + len(SPECIALS)} (256 bytes and '
      f'{len(SPECIALS)} special tokens); raise it'
    )
  tokenizer = _train_bpe(texts, vocab_size - len(SPECIALS))
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
  )
  from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

  tokenizer.post_processor = Sequence(
    [
      ByteLevel(trim_offsets=False),
      TemplateProcessing(
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
  for name, content in side_files(
    ids, image_size, patch_size, system_prompt, model_max_length
  ).items():
    (directory / name).write_text(
      json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
    )
  (directory / 'chat_template.jinja').write_text(CHAT_TEMPLATE, encoding='utf-8')
  return Processor.from_directory(directory)


def _train_bpe(texts, vocab_size):
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())

  # As DeepSeek-LLM splits: each line break alone, a space goes with the word or the mark after it,
  # digits one by one.
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
  # Contents follow ':' or an image, hence with and without the leading space, as they will be
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
  """File name -> JSON content of everything of the Hugging Face layout beside tokenizer.json,
  config.json and the weights.

  ids: of the `SPECIALS`, by their text. For the other arguments see `make_tokenizer`.
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
      min_size=MIN_SIDE,
      resample=3,
      do_rescale=True,
      rescale_factor=1 / 255,
      do_normalize=True,
      image_mean=[0.5] * 3,
      image_std=[0.5] * 3,
      do_pad=True,
      background_color=list(_GREY),
    ),
    'generation_config.json': dict(
      bos_token_id=ids[BOS],
      eos_token_id=ids[EOS],
      pad_token_id=ids[PAD],
      guidance_scale=5,
      generation_kwargs=dict(boi_token_id=ids[BOI]),
    ),
  }
