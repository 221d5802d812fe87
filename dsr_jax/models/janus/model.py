"""Janus: one LLaMA that reads images through SigLIP and draws them as VQ codes.

Sources: deepseek-ai/Janus janus/models/modeling_vlm.py, generation_inference.py; templates as in
janus/utils/conversation.py.
Axes: B inputs, G candidates, R prefixes, C candidates of a prefix, P prefix length, T text tokens,
N image codes, D width, V text vocabulary, K image codes in the codebook, H W pixels.

Every prompt is split before its last token: the tokens before it are the prefix that candidates
share, and the last one (begin-of-image, or the colon after the assistant's name) starts each
candidate. So the state at position t predicts token t.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import sharding
from dsr_jax.models.common import decoder as decoder_lib
from dsr_jax.models.common import pictures, structure, texts
from dsr_jax.models.common.candidates import pair_up
from dsr_jax.models.common.layers import Embedding, Head, Linear, gelu
from dsr_jax.models.common.logprobs import TokenScores, guide, token_scores
from dsr_jax.models.common.prefix import Prefix
from dsr_jax.models.common.sampling import sample_tokens
from dsr_jax.models.common.splice import spliced
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.llama import LanguageModel
from dsr_jax.models.janus.siglip import VisionModel
from dsr_jax.models.janus.vq import VQModel
from dsr_jax.models.unified import (
  Picture,
  Sampling,
  Scoring,
  Spec,
  Text,
  guided_codes,
  without_eos,
)


class Aligner(nnx.Module):
  def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
    self.fc1 = Linear(width_in, width, rngs=rngs)
    self.hidden_layer = Linear(width, width, rngs=rngs)

  def __call__(self, x):
    return self.hidden_layer(gelu(self.fc1(x)))


class GenerationHead(nnx.Module):
  def __init__(self, width: int, codes: int, *, rngs: nnx.Rngs):
    self.proj_out = Linear(width, width, rngs=rngs)
    self.vision_head = Head(width, codes, rngs=rngs)

  def __call__(self, x):
    """x: (..., D) -> float32 logits (..., K)."""
    return self.vision_head(gelu(self.proj_out(x)))


class Janus(nnx.Module):
  """Implements `unified.UnifiedModel`."""

  def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.text.hidden_size
    self.language_model = LanguageModel(config.text, rngs=rngs)
    self.lm_head = Head(width, config.text.vocab_size, rngs=rngs, bias=False)
    self.vision_model = VisionModel(config.vision, rngs=rngs)
    self.aligner = Aligner(config.vision.hidden_size, width, rngs=rngs)
    self.generation_embeddings = Embedding(
      config.vq.num_embeddings, config.vq.embed_dim, rngs=rngs, scale=1.0
    )
    self.generation_aligner = Aligner(config.vq.embed_dim, width, rngs=rngs)
    self.generation_head = GenerationHead(width, config.vq.num_embeddings, rngs=rngs)
    self.vqmodel = VQModel(config.vq, rngs=rngs)

  @property
  def spec(self) -> Spec:
    return spec_of(self.config)

  # Images: pixels <-> codes, and pixels -> the vectors that the language model reads.

  def picture_from_pixels(self, pixels) -> Picture:
    return Picture(pictures.encode(self.vqmodel, pixels, self.config.image_size), pixels)

  def picture_from_codes(self, codes) -> Picture:
    return Picture(codes, pictures.decode(self.vqmodel, codes, self.config.image_size))

  def image_features(self, pixels, *, remat: bool = False):
    """pixels: (R, H, W, 3) -> vectors in place of token embeddings (R, N, D)."""
    pixels = pixels.astype(self.vision_model.patch_embedding.kernel[...].dtype)

    def see(parts, x):
      return parts[1](parts[0](x, remat=remat))

    seeing = self.vision_model, self.aligner
    return pictures.over_pictures(see, seeing, pixels, self.config.image_size)

  def code_embeddings(self, codes):
    """codes: (...) -> (..., D)."""
    return self.generation_aligner(self.generation_embeddings(codes))

  def text_logits(self, hidden):
    """hidden: (..., D) -> float32 (..., V), with special tokens excluded, so that sampling and
    scoring use the same policy.
    """
    logits = self.lm_head(hidden)
    if not self.config.templates.forbidden_text_ids:
      return logits
    forbidden = np.zeros(logits.shape[-1], bool)
    forbidden[list(self.config.templates.forbidden_text_ids)] = True
    return jnp.where(forbidden, -1e30, logits)  # finite, so that p log p is 0 in the entropy

  # Prefixes.

  def _spliced(self, before: tuple[int, ...], content: Text, after: tuple[int, ...]):
    """Template around content (R, T) -> ids (R, P), padded on the right, and lengths (R,)."""
    pad_id = self.config.templates.pad_id
    return spliced(before, content.ids, content.mask, after, pad_id=pad_id)

  def _generation_prefix(self, prompt: Text, guided: bool, *, blank=None, remat: bool = False):
    """prompt: (R, T) -> the prefix of R rows; guided: of 2 R rows, (cond, uncond) in pairs.

    The unconditional row has the same length, begin-of-sentence and begin-of-image; all tokens
    between them are the padding token, and they are attended to.
    blank: (R,) bool, the rows that are unconditional themselves (prompt dropout).
    """
    t = self.config.templates
    ids, length = self._spliced(
      t.generation_prefix, without_eos(prompt, t.eos_id), t.generation_suffix[:-1]
    )
    unconditional = jnp.where(jnp.arange(ids.shape[1]) == 0, ids, t.pad_id)
    if blank is not None:
      ids = jnp.where(blank[:, None], unconditional, ids)
    if guided:
      ids = jnp.stack([ids, unconditional], axis=1).reshape(-1, ids.shape[1])
      length = jnp.repeat(length, 2)
    return self.language_model.prefill(self.language_model.embed_tokens(ids), length, remat=remat)

  def _understanding_prefix(self, pixels, question: Text, *, remat: bool = False):
    """pixels: (R, H, W, 3), question: (R, T) -> the prefix of R rows."""
    t = self.config.templates
    rows = pixels.shape[0]
    embed = self.language_model.embed_tokens

    def fixed(ids):
      return jnp.broadcast_to(
        embed(jnp.asarray(ids, jnp.int32)), (rows, len(ids), self.config.text.hidden_size)
      )

    tail, length = self._spliced(t.understanding_infix, question, t.understanding_suffix[:-1])
    picture = self.image_features(pixels, remat=remat)
    embeds = jnp.concatenate([fixed(t.understanding_prefix), picture, embed(tail)], axis=1)
    return self.language_model.prefill(
      embeds, length + len(t.understanding_prefix) + picture.shape[1], remat=remat
    )

  # Sampling: the prefix once per group, then token by token.

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    inputs, group = keys.shape
    total = self.config.num_codes
    guided = guided_codes(how, total)

    # The prompt runs once; with guidance, it is two rows, conditional and unconditional.
    decoder = decoder_lib.make(
      self.language_model,
      self._generation_prefix(prompt, guided > 0),
      candidates=group,
      tokens=guided or total,
      scan=how.scan,
      cache_dtype=how.cache_dtype,
    )
    # The embeddings of all codes, (K, D), computed once.
    table = self.code_embeddings(jnp.arange(self.config.vq.num_embeddings))
    table = sharding.keep_whole(table)

    def embed(codes, branches):
      """codes (B, G) -> (R, G, D): both branches read the same code."""
      x = sharding.split_rows(table[codes])
      x = jnp.broadcast_to(x[:, None], (inputs, branches, *x.shape[1:]))
      return x.reshape(-1, *x.shape[2:])

    def sample(hidden, t, branches):
      """hidden (R, G, D) -> codes (B, G) and their log-probabilities, with branches joined."""
      logits = self.generation_head(hidden).reshape(inputs, branches, group, -1)
      logits = guide(logits, how.guidance, axis=1) if branches == 2 else logits[:, 0]
      return sample_tokens(logits, keys, t, how.temperature)

    branches = 2 if guided else 1
    start = self._start_of_picture()
    carry = _Drawing(
      embeds=jnp.broadcast_to(start, (inputs * branches, group, start.shape[-1])), cache=None
    )
    parts = []
    for first, end in _pieces(guided, total, decoder.segment(how.segment)):
      if first and first == guided:  # the rest is drawn without guidance
        decoder, cache = decoder.first_of(2, carry.cache, total)
        embeds = carry.embeds.reshape(inputs, 2, *carry.embeds.shape[1:])[:, 0]
        carry, branches = _Drawing(embeds, cache), 1

      def body(carry, t, decoder=decoder, branches=branches, room=end):
        hidden, cache = decoder.step(carry.embeds, carry.cache, t, room)
        codes, logps = sample(hidden, t, branches)
        return _Drawing(embed(codes, branches), cache), (codes, logps)

      carry = carry._replace(cache=decoder.grow(carry.cache, end - first))
      with jax.named_scope('decode'):
        carry, part = jax.lax.scan(body, carry, jnp.arange(first, end))
      parts.append(part)
    codes, logps = (texts.joined(x) for x in zip(*parts))
    return codes, logps

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    # The image and the question run once for the whole group.
    return self._write(self._understanding_prefix(picture.pixels, question), keys, how)

  def _write(self, prefix: Prefix, keys, how: Sampling):
    """Texts after R prefixes: keys (R, G) -> Text (R, G, T), logps (R, G, T)."""
    decoder = decoder_lib.make(
      self.language_model,
      prefix,
      candidates=keys.shape[1],
      tokens=how.max_tokens,
      scan=how.scan,
      cache_dtype=how.cache_dtype,
    )
    embed = self.language_model.embed_tokens
    ids, logps, mask = texts.write(
      decoder, embed, self.text_logits, keys, how, self.config.templates
    )
    return Text(ids, mask), logps

  # Questions about images: the images once, then each question after them.

  def read(self, pictures: Picture, mask) -> Prefix:
    """See the protocol. A turn begins with its images, each between its two marker tokens."""
    t = self.config.templates
    pixels = pictures.pixels
    rows, most = pixels.shape[:2]
    embed = self.language_model.embed_tokens

    def fixed(ids, *shape):
      """The embeddings of ids (n,), for each of `shape`: (*shape, n, D)."""
      x = embed(jnp.asarray(ids, jnp.int32))
      return jnp.broadcast_to(x, (*shape, *x.shape))

    seen = self.image_features(pixels.reshape(-1, *pixels.shape[2:]))
    seen = seen.reshape(rows, most, *seen.shape[1:])
    marked = [fixed((t.boi_id,), rows, most), seen, fixed((t.eoi_id,), rows, most)]
    marked = jnp.concatenate(marked, axis=2)  # (B, P, N + 2, D)
    before = t.understanding_prefix[:-1]  # the last one is the first image's marker
    embeds = jnp.concatenate(
      [fixed(before, rows), marked.reshape(rows, -1, seen.shape[-1])], axis=1
    )
    length = len(before) + jnp.sum(mask, axis=1, dtype=jnp.int32) * marked.shape[2]
    return self.language_model.prefill(embeds, length)

  def answer(self, reading: Prefix, question: Text, keys, how: Sampling):
    write = functools.partial(self._write, how=how)
    t = self.config.templates
    return texts.answer(self.language_model, reading, question, keys, write, t)

  # Likelihoods: the prefix once per condition, then whole samples at once (teacher forcing).

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring, *, blank=None) -> TokenScores:
    """See the protocol. blank (R,) bool replaces whole prompts with the unconditional one
    (pretraining only).
    """
    del keys  # Janus' likelihood is deterministic
    guided = guided_codes(how, codes.shape[-1])
    prompt, (codes,), (inputs, rows, group) = pair_up(prompt, (codes,))
    branches = 2 if guided else 1
    prefix = self._generation_prefix(prompt, guided > 0, blank=blank, remat=how.remat)

    # The inputs are begin-of-image and the codes shifted by one: state t predicts code t.
    start = self._start_of_picture()
    embeds = self.code_embeddings(codes[..., :-1])  # (R, C, N-1, D)
    start = jnp.broadcast_to(start, (*embeds.shape[:2], 1, embeds.shape[-1]))
    embeds = jnp.concatenate([start, embeds], axis=2)
    if guided:
      embeds = jnp.repeat(embeds, 2, axis=0)
    hidden = self.language_model.extend(prefix, embeds, remat=how.remat)
    hidden = hidden.reshape(rows, branches, *hidden.shape[1:])

    def mixed(hidden):
      return guide(self.generation_head(hidden), how.guidance, axis=1)

    def plain(hidden):
      return self.generation_head(hidden)[:, 0]

    # The first `guided` codes have the guided mixture's probability, the rest the conditional one.
    parts = []
    for first, end, logits in ((0, guided, mixed), (guided, codes.shape[-1], plain)):
      if first < end:
        here = codes[..., first:end]
        scores = token_scores(
          hidden[..., first:end, :],
          logits,
          here,
          jnp.ones(here.shape, bool),
          temperature=how.temperature,
          chunk=how.chunk,
        )
        parts.append(scores)
    joined = (jnp.concatenate(x, axis=-1) for x in zip(*parts))
    return TokenScores(*(x.reshape(inputs, group, -1) for x in joined))

  def text_logps(
    self, picture: Picture, question: Text, text: Text, keys, how: Scoring
  ) -> TokenScores:
    del keys  # Janus' likelihood is deterministic
    per_input = picture.pixels.shape[1]
    pixels, (ids, mask), (inputs, _, group) = pair_up(picture.pixels, (text.ids, text.mask))
    question = Text(*(jnp.repeat(x, per_input, axis=0) for x in question))
    prefix = self._understanding_prefix(pixels, question, remat=how.remat)

    scores = texts.score(
      self.language_model,
      prefix,
      self.text_logits,
      ids,
      mask,
      how,
      self.config.templates,
    )
    return TokenScores(*(x.reshape(inputs, group, -1) for x in scores))

  def _start_of_picture(self):
    """The embedding of begin-of-image, (D,), which starts every image."""
    boi = self.config.templates.generation_suffix[-1]
    return self.language_model.embed_tokens(jnp.asarray(boi))


class _Drawing(NamedTuple):
  """The decode loop's carry for images: the last codes' embeddings (R, G, D), and the cache."""

  embeds: jax.Array
  cache: Any


def _pieces(guided: int, total: int, segment: int):
  """(first, end) of the segments of an image, in the order of decoding, guided ones first."""
  return [
    (first, min(first + segment, last))
    for start, last in ((0, guided), (guided, total))
    for first in range(start, last, segment)
  ]


def spec_of(config: JanusConfig) -> Spec:
  """The `Spec` of a model of these sizes."""
  return Spec(
    eos_id=config.templates.eos_id if config.templates else -1,
    num_codes=config.num_codes,
    codebook_size=config.vq.num_embeddings,
    image_size=config.image_size,
    max_pictures=0,
  )


# (config, seed) -> (graphdef, params); config -> shapes; config -> graphdef.
create = functools.partial(structure.create, Janus)
abstract_params = functools.partial(structure.abstract_params, Janus)
graphdef_of = functools.partial(structure.graphdef_of, Janus)
