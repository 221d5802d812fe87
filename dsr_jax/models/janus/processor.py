"""Text at the border: the tokenizer, its special tokens and Janus' prompt templates.

Everything here runs on the host in NumPy and needs no model. Special tokens are found by their
literal string, because their ids differ between the 1B and the 7B checkpoint (the 1B pad is the 7B
letter row, and the other way round). A role is encoded as any text is: `<|User|>` is one token
where the tokenizer has it, and several where it does not.

Axes: B texts, T tokens.
"""

import pathlib

from tokenizers import Tokenizer

from dsr_jax import files
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.border import TextBorder
from dsr_jax.models.janus.config import ROLES, Templates

# Bars and blocks of the first three are U+FF5C and U+2581, not ASCII.
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
    template: the name of the words that frame a prompt, a key of `ROLES`.
    templates: the `Templates` the model's protocol methods splice around contents.
  """

  def __init__(self, tokenizer, vocab_size=None, system_prompt=False, template='tokens'):
    """vocab_size: rows of the model's text embedding; ids beyond the tokenizer's last are never
    sampled.
    """
    self.tokenizer, self.system_prompt, self.template = tokenizer, system_prompt, template
    added = tokenizer.added_tokens_decoder
    by_text = {token.content: i for i, token in added.items()}
    ids = {token: by_text[token] for token in SPECIALS if token in by_text}
    missing = [token for token in NEEDED if token not in ids]
    if missing:
      raise InputError(
        f"found a tokenizer without the special tokens {missing}; expected all of Janus' "
        f'{list(NEEDED)}; use the tokenizer that belongs to the checkpoint'
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
    self._rows = rows
    encode = self._encode
    asks, answers = ROLES[template]
    # Where `<|User|>` is no token of its own, anybody could write it.
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
    """Reads tokenizer.json, and, where they exist, processor_config.json and from config.json the
    row count and the template that the model was reinforced with.
    """
    directory = pathlib.Path(directory)
    # The file itself, not AutoTokenizer: a `LlamaTokenizer` named in tokenizer_config.json is
    # rebuilt by transformers 5 as a sentencepiece tokenizer, while Janus' is a byte-level BPE.
    tokenizer = _load_tokenizer(directory / 'tokenizer.json')
    settings = files.read_json(directory / 'processor_config.json', default={})
    config = files.read_json(directory / 'config.json', default={})
    if vocab_size is None:
      text = config.get('text_config') or config.get('language_config') or {}
      vocab_size = text.get('vocab_size')
    ours = config.get('dsr_jax') or {}
    if not isinstance(ours, dict):
      raise InputError(
        f'found dsr_jax {str(ours)[:60]!r} in {directory}/config.json; expected an object; remove '
        'it, or convert the model again'
      )
    template = ours.get('template', 'tokens')
    if not isinstance(template, str) or template not in ROLES:
      raise InputError(
        f'found the template {str(template)[:60]!r} in {directory}/config.json; expected '
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
    """Ids of a question's content (it follows a line break, so no leading space).

    An empty one, as an instruction may be, has none.
    """
    if not text.strip():
      return []
    return self._content(text.strip(), 'question', max_tokens)

  def encode_turn(self, text):
    """Ids of all that follows the pictures in a user's turn: as it stands, but for blanks at its
    end, so a line break that leads is part of it.
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
  # transformers takes a second to import, and many a command never needs a tokenizer.
  from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

  if not path.is_file():
    raise InputError(
      f'found no {path.name} in {path.parent}; expected a model directory with its tokenizer; '
      'check the path'
    )
  files.check_no_pointer(path)
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as e:  # the Rust side raises bare Exception
    raise InputError(
      f'found {path} unreadable ({first_line(e)}); expected a tokenizer.json; fetch the file again'
    ) from e
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    padding_side='left',
    clean_up_tokenization_spaces=False,
  )
