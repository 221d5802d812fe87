"""Sizes of a Show-o and the token ids of its prompts: frozen, hashable, static under `jit`."""

import dataclasses

# Rows of the vocabulary between the tokenizer's own tokens and the image codes: the padding token
# and nine tokens such as <|soi|>.
NEW_WORDS = 10
PROMPT_TOKENS = 126  # maximum of a prompt: 128 text positions of the published models, minus two
# How a question is framed: as in the original's demo, or as in the tuning of its models.
TEMPLATES = ('demo', 'tuned')


@dataclasses.dataclass(frozen=True)
class PhiConfig:
  """Phi-1.5 with norms on queries and keys; multi-head attention without grouping.

  vocab_size: number of ids that a text may have: the tokenizer's, without those that Show-o adds.
  rotary_factor: the share of a head that is rotated.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  layer_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rotary_factor: float = 0.5
  max_position_embeddings: int = 2048

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.rotary_factor)


@dataclasses.dataclass(frozen=True)
class MagvitConfig:
  """MAGVIT-v2 with lookup-free quantization: a code is the signs of its channels.

  Levels are ordered from the highest resolution down; each except the last halves the image's side.

  bits: number of quantized channels. encoder_widths, decoder_widths: of the levels, in multiples of
  `base_channels`. encoder_blocks, decoder_blocks: residual blocks of the levels.
  """

  bits: int = 13
  base_channels: int = 128
  encoder_widths: tuple[int, ...] = (1, 2, 2, 4, 4)
  encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
  decoder_widths: tuple[int, ...] = (1, 1, 2, 2, 4)
  decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)

  @property
  def num_embeddings(self) -> int:
    return 2**self.bits

  @property
  def downsampling(self) -> int:
    return 2 ** (len(self.encoder_widths) - 1)


@dataclasses.dataclass(frozen=True)
class Templates:
  """Token ids around a prompt, made by `processor.py` from the tokenizer.

  generation:    generation_prefix, content, generation_suffix (ends with soi), image codes, eoi
  understanding: understanding_prefix (ends with soi), image codes, understanding_infix (starts with
                 eoi), question, understanding_suffix, answer, eos

  as_prompt, as_answer: tables of the text vocabulary, int32 bytes: the id of a word with a leading
    space -> its id without, and the reverse (`Spec`). As bytes, their hash is cached.
  """

  eos_id: int
  pad_id: int
  soi_id: int
  eoi_id: int
  generation_prefix: tuple[int, ...]
  generation_suffix: tuple[int, ...]
  understanding_prefix: tuple[int, ...]
  understanding_infix: tuple[int, ...]
  understanding_suffix: tuple[int, ...]
  as_prompt: bytes = b''
  as_answer: bytes = b''


@dataclasses.dataclass(frozen=True)
class ShowoConfig:
  """A whole Show-o.

  num_codes: N, of a square image. prompt_tokens: maximum of a prompt; a longer one is truncated, as
  in the original. sampling_steps, sampling_noise: the sampler's defaults: T, and the weight of its
  noise before the first step.
  """

  text: PhiConfig
  vq: MagvitConfig
  num_codes: int
  prompt_tokens: int = PROMPT_TOKENS
  sampling_steps: int = 18
  sampling_noise: float = 1.0
  templates: Templates | None = None

  @property
  def image_size(self) -> int:
    return self.grid * self.vq.downsampling

  @property
  def grid(self) -> int:
    """Side of the square of image codes."""
    return round(self.num_codes**0.5)

  # Rows of the shared vocabulary: text tokens, Show-o's own tokens, image codes, the mask token.

  @property
  def first_code(self) -> int:
    return self.text.vocab_size + NEW_WORDS

  @property
  def mask_id(self) -> int:
    return self.first_code + self.vq.num_embeddings

  @property
  def rows(self) -> int:
    return self.mask_id + 1

  @property
  def reading_tokens(self) -> int:
    """Tokens that an image takes when it is read: its codes, and mmu, soi, eoi."""
    return self.num_codes + 3

  @classmethod
  def tiny(cls, vocab_size: int = 40) -> 'ShowoConfig':
    """For tests: has every part, as small as possible (group norms need multiples of 32)."""
    return cls(
      text=PhiConfig(vocab_size, 32, 48, 2, 2, max_position_embeddings=256),
      vq=MagvitConfig(
        bits=4,
        base_channels=32,
        encoder_widths=(1, 2, 2),
        encoder_blocks=(2, 1, 1),
        decoder_widths=(1, 1, 2),
        decoder_blocks=(1, 2, 1),
      ),
      num_codes=16,
      prompt_tokens=32,
      sampling_steps=5,
    )

  @classmethod
  def scenes(cls, vocab_size: int = 640) -> 'ShowoConfig':
    """The small model: 32x32 images as 8x8 codes, from a codebook of 512. vocab_size: the
    tokenizer's.
    """
    return cls(
      text=PhiConfig(vocab_size, 128, 512, 4, 4, max_position_embeddings=512),
      vq=MagvitConfig(
        bits=9,
        base_channels=32,
        encoder_widths=(1, 1, 2),
        encoder_blocks=(1, 1, 1),
        decoder_widths=(1, 1, 2),
        decoder_blocks=(2, 2, 2),
      ),
      num_codes=64,
      sampling_steps=32,
    )

  @classmethod
  def showo_256(cls) -> 'ShowoConfig':
    return cls(
      text=PhiConfig(50295, 2048, 8192, 24, 32), vq=MagvitConfig(), num_codes=256, sampling_steps=18
    )

  @classmethod
  def showo_512(cls) -> 'ShowoConfig':
    return dataclasses.replace(cls.showo_256(), num_codes=1024, sampling_steps=50)
