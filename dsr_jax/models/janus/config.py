"""Sizes of a Janus model and token-id templates of its prompts: frozen, hashable, static under
`jit`.
"""

import dataclasses

# Template -> the names of user and assistant. The first is in Janus-Pro's own README; the second is
# used by Janus-1.3B, T2I-R1 and the published scores of VLMEvalKit.
ROLES = {'tokens': ('<|User|>', '<|Assistant|>'), 'plain': ('User', 'Assistant')}


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """LLaMA: multi-head attention without grouping, SwiGLU, untied head."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  head_dim: int
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  max_position_embeddings: int = 16384


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """SigLIP vision tower without its attention pool; square images, learned positions."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  image_size: int
  patch_size: int
  layer_norm_eps: float = 1e-6

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class VQConfig:
  """LlamaGen's VQ tokenizer; each level except the last halves the image's side."""

  num_embeddings: int
  embed_dim: int = 8
  latent_channels: int = 256
  base_channels: int = 128
  channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2

  @property
  def downsampling(self) -> int:
    return 2 ** (len(self.channel_multiplier) - 1)


@dataclasses.dataclass(frozen=True)
class Templates:
  """Token ids around a prompt, made by `processor.py` from the tokenizer.

  generation:    generation_prefix, content, generation_suffix (ends with begin-of-image), image
  codes
  understanding: understanding_prefix (ends with begin-of-image), image embeddings,
                 understanding_infix (starts with end-of-image), question, understanding_suffix,
                 answer, eos
  """

  bos_id: int
  eos_id: int
  pad_id: int
  boi_id: int
  eoi_id: int
  image_id: int
  generation_prefix: tuple[int, ...]
  generation_suffix: tuple[int, ...]
  understanding_prefix: tuple[int, ...]
  understanding_infix: tuple[int, ...]
  understanding_suffix: tuple[int, ...]
  forbidden_text_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class JanusConfig:
  """A whole Janus. The sizes of the aligners and the generation head follow from the parts."""

  text: TextConfig
  vision: VisionConfig
  vq: VQConfig
  templates: Templates | None = None

  @property
  def image_size(self) -> int:
    return self.vision.image_size

  @property
  def grid(self) -> int:
    """Side of the square of image codes."""
    return self.image_size // self.vq.downsampling

  @property
  def num_codes(self) -> int:
    return self.grid**2

  @classmethod
  def tiny(cls, vocab_size: int = 320) -> 'JanusConfig':
    """For tests: has every part, as small as possible (group norms need multiples of 32)."""
    return cls(
      text=TextConfig(vocab_size, 32, 64, 2, 4, 8),
      vision=VisionConfig(32, 64, 2, 4, image_size=16, patch_size=4),
      vq=VQConfig(
        32,
        embed_dim=8,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=(1, 1, 2),
        num_res_blocks=1,
      ),
    )

  @classmethod
  def scenes(cls, vocab_size: int = 640) -> 'JanusConfig':
    """The embedded model: 32x32 images as 8x8 codes, from a codebook of 512."""
    return cls(
      text=TextConfig(vocab_size, 128, 352, 4, 4, 32),
      vision=VisionConfig(96, 384, 2, 4, image_size=32, patch_size=4),
      vq=VQConfig(
        512,
        embed_dim=8,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=(1, 1, 2),
        num_res_blocks=1,
      ),
    )

  @classmethod
  def janus_pro_1b(cls) -> 'JanusConfig':
    return cls(
      text=TextConfig(102400, 2048, 5632, 24, 16, 128),
      vision=VisionConfig(1024, 4096, 24, 16, image_size=384, patch_size=16),
      vq=VQConfig(16384),
    )

  @classmethod
  def janus_pro_7b(cls) -> 'JanusConfig':
    return dataclasses.replace(
      cls.janus_pro_1b(), text=TextConfig(102400, 4096, 11008, 30, 32, 128)
    )
