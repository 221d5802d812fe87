"""Text processing: the tokenizer, its special tokens and Janus' prompt templates.

Everything here runs on the host in NumPy and needs no model. Special tokens are found by their
literal string, because their ids differ between the 1B and the 7B checkpoint (the 1B's id of the
padding token is a letter in the 7B, and vice versa). A role is encoded like any text: `<|User|>` is
one token if the tokenizer has it, and several if not.

Axes: B texts, T tokens.
"""

import pathlib

from tokenizers import Tokenizer

from dsr_jax import files
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.border import TextBorder
from dsr_jax.models.janus.config import ROLES, Templates

# The bars and blocks in the first three are U+FF5C and U+2581, not ASCII.
BOS = '<\uff5cbegin\u2581of\u2581sentence\uff5c>'
EOS = '<\uff5cend\u2581of\u2581sentence\uff5c>'
PAD = '<\uff5c\u2581pad\u2581\uff5c>'
BOI, EOI, IMAGE = '<begin_of_image>', '<end_of_image>', '<image_placeholder>'
NEEDED = (BOS, EOS, PAD, BOI, EOI, IMAGE)
USER, ASSISTANT = ROLES['tokens']
SPECIALS = (*NEEDED, USER, ASSISTANT)

SYSTEM_PROMPT = (
  'You are a helpful language and vision assistant. You are able to understand the visual content '
  'that the user '
  'provides, and assist the user with a variety of tasks using natural language.\n\n'
)


class Processor(TextBorder):
  """Encodes and decodes texts for one model directory.

  Attributes:
    tokenizer: the transformers `PreTrainedTokenizerFast`.
    system_prompt: whether understanding prompts begin with Janus' system prompt.
    template: the name of the prompt template, a key of `ROLES`.
    templates: the `Templates` that the model's protocol methods put around contents.
  """

  def __init__(self, tokenizer, vocab_size=None, system_prompt=False, template='tokens'):
    """vocab_size: rows of the model's text embedding; ids beyond the tokenizer's are never
    sampled.
    """
    self.tokenizer, self.system_prompt, self.template = tokenizer, system_prompt, template
    added = tokenizer.added_tokens_decoder
    by_text = {token.content: i for i, token in added.items()}
    ids = {token: by_text[token] for token in SPECIALS if token in by_text}
    missing = [token for token in NEEDED if token not in ids]
    if missing:
      raise InputError(
        f"the tokenizer lacks the special tokens {missing} of Janus' {list(NEEDED)}; use the "
        'tokenizer that belongs to the checkpoint'
      )
    rows = vocab_size or len(tokenizer)
    if rows < len(tokenizer):
      raise InputError(
        f'the tokenizer has {len(tokenizer)} tokens, more than the {rows} text rows of the model; '
        'use the tokenizer that belongs to the checkpoint'
      )
    # Janus' own tokens and all tokens marked special. DeepSeek also adds plain letters as tokens;
    # they stay allowed.
    self._special = frozenset(ids.values()) | {i for i, token in added.items() if token.special}
    self._rows = rows
    encode = self._encode
    asks, answers = ROLES[template]
    # If `<|User|>` is not one token, it could occur in user text.
    self._reserved = [r for r in (asks, answers) if template == 'tokens' and r not in ids]
    user, assistant = encode(f'{asks}:'), encode(f'\n\n{answers}:')
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
      understanding_prefix=tuple(head + encode(f'{asks}: ') + [ids[BOI]]),
      understanding_infix=tuple([ids[EOI]] + encode('\n')),
      understanding_suffix=tuple(assistant),
      forbidden_text_ids=tuple(
        sorted((self._special - {ids[EOS]}) | set(range(len(tokenizer), rows)))
      ),
    )

  @classmethod
  def from_directory(cls, directory, vocab_size=None):
    """Reads tokenizer.json and, if they exist, processor_config.json and config.json, which has the
    row count and the template that the model was reinforced with.
    """
    directory = pathlib.Path(directory)
    # Not AutoTokenizer: if tokenizer_config.json names `LlamaTokenizer`, transformers 5 builds a
    # sentencepiece tokenizer, but Janus' is a byte-level BPE.
    tokenizer = _load_tokenizer(directory / 'tokenizer.json')
    settings = files.read_json(directory / 'processor_config.json', default={})
    config = files.read_json(directory / 'config.json', default={})
    if vocab_size is None:
      text = config.get('text_config') or config.get('language_config') or {}
      vocab_size = text.get('vocab_size')
    ours = config.get('dsr_jax') or {}
    if not isinstance(ours, dict):
      raise InputError(
        f'dsr_jax in {directory}/config.json is {str(ours)[:60]!r}, not an object; remove it, or '
        'convert the model again'
      )
    template = ours.get('template', 'tokens')
    if not isinstance(template, str) or template not in ROLES:
      raise InputError(
        f'the template in {directory}/config.json is {str(template)[:60]!r}, not '
        f'{" or ".join(ROLES)}; convert the model again'
      )
    return cls(tokenizer, vocab_size, _has_system_prompt(settings, config, ours), template)

  def with_template(self, template):
    """The same tokenizer with another template, a key of `ROLES`."""
    return Processor(self.tokenizer, self._rows, self.system_prompt, template)

  def encode_prompt(self, text, max_tokens=None):
    """Ids of a drawing prompt's content, with the leading space that the template expects."""
    return self._content(' ' + text.strip(), 'prompt', max_tokens)

  def encode_question(self, text, max_tokens=None):
    """Ids of a question's content, without a leading space because it follows a line break.

    Empty for an empty text, such as an empty instruction.
    """
    if not text.strip():
      return []
    return self._content(text.strip(), 'question', max_tokens)

  def encode_turn(self, text):
    """Ids of everything after the images in a user's turn, including a leading line break; only
    trailing whitespace is removed.
    """
    return self._content(text.rstrip(), 'question', None)

  def encode_answer(self, text, max_tokens=None):
    """Ids of an answer with its leading space, and the end-of-sentence token."""
    return self._content(' ' + text.strip(), 'answer', max_tokens and max_tokens - 1) + [
      self.templates.eos_id
    ]


def _has_system_prompt(settings, config, ours):
  """Whether understanding prompts begin with the system prompt. settings, config, ours:
  processor_config.json, config.json and our section of it.
  """
  if (
    settings.get('processor_class') == 'VLChatProcessor'
    or config.get('model_type') == 'multi_modality'
  ):
    return bool(ours.get('system_prompt', True))  # the original's processor always has it
  return bool(settings.get('use_default_system_prompt'))


def _load_tokenizer(path):
  # transformers takes a second to import, and many commands need no tokenizer.
  from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

  if not path.is_file():
    raise InputError(
      f'there is no {path.name} in {path.parent}; check the path, which should be a model '
      'directory with its tokenizer'
    )
  files.check_no_pointer(path)
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as e:  # the Rust code raises plain Exception
    raise InputError(
      f'cannot read {path} as a tokenizer.json ({first_line(e)}); fetch the file again'
    ) from e
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    padding_side='left',
    clean_up_tokenization_spaces=False,
  )
