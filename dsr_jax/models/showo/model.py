"""Show-o: one Phi that reads and draws images as codes of one tokenizer.

An image is drawn by unmasking: all positions at once, with some of them fixed at every step. It
therefore has no autoregressive likelihood; `picture_logps` has two estimates. Texts are
autoregressive, with an exact likelihood.

Sources: showlab/Show-o (arXiv 2408.12528) models/modeling_showo.py, training/prompting_utils.py.
Axes: B inputs, G candidates, R prefixes (rows), C candidates of a prefix, P prefix length, T text
tokens, N image codes, D width, V text vocabulary, K image codes in the codebook, H W pixels.

  generation      t2i sot PROMPT eot | soi CODES eoi      all is seen; state k predicts code k
  understanding   mmu soi CODES eoi sot QUESTION ASSISTANT | : TEXT    state t predicts token t

The part left of the bar is the prefix that candidates share.
"""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common import decoder as decoder_lib
from dsr_jax.models.common import pictures, structure, texts
from dsr_jax.models.common.candidates import pair_up
from dsr_jax.models.common.logprobs import TokenScores, guide, token_scores
from dsr_jax.models.common.prefix import Prefix
from dsr_jax.models.common.sampling import sample_tokens
from dsr_jax.models.common.splice import compacted, spliced
from dsr_jax.models.showo import maskgit
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.showo.magvit import Magvit
from dsr_jax.models.showo.phi import LanguageModel, SharedHead
from dsr_jax.models.unified import Picture, Sampling, Scoring, Spec, Text, without_eos

PROMPT_DROP = 0.15  # of tokens in the loss, as in diffu-GRPO (arXiv 2504.12216)
# Folded into a likelihood's key: for the choice of dropped tokens, and for each draw of the bound.
WORDS, DRAWS = 0, 1
# Folded into a sampler's key: step and position for codes; this and the step for the confidence.
SURENESS = 2**30


class Showo(nnx.Module):
  """Implements `unified.UnifiedModel`."""

  def __init__(self, config: ShowoConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.language_model = LanguageModel(config.text, config.rows, rngs=rngs)
    self.lm_head = SharedHead(config.text.hidden_size, config.rows, rngs=rngs)
    self.vqmodel = Magvit(config.vq, rngs=rngs)

  @property
  def spec(self) -> Spec:
    return spec_of(self.config)

  # Images: pixels <-> codes.

  def picture_from_pixels(self, pixels) -> Picture:
    return Picture(pictures.encode(self.vqmodel, pixels, self.config.image_size), pixels)

  def picture_from_codes(self, codes) -> Picture:
    return Picture(codes, pictures.decode(self.vqmodel, codes, self.config.image_size))

  def _codes(self, picture: Picture):
    """The codes (..., N) that are read of an image."""
    if picture.codes is not None:
      return picture.codes
    return self.picture_from_pixels(picture.pixels).codes

  # Logits: texts and images have separate rows in one head.

  def text_logits(self, hidden):
    """hidden: (..., D) -> float32 (..., V), without Show-o's own tokens and image codes."""
    return self.lm_head.part(hidden, 0, self.config.text.vocab_size)

  def code_logits(self, hidden):
    """hidden: (..., D) -> float32 (..., K)."""
    first = self.config.first_code
    return self.lm_head.part(hidden, first, first + self.config.vq.num_embeddings)

  # Prefixes.

  def _generation_prefix(
    self, prompt: Text, guided: bool, *, dropped=None, blank=None, remat: bool = False
  ):
    """prompt: (R, T) -> the prefix of R rows; guided: of 2 R rows, (cond, uncond) in pairs.

    dropped: `_Dropped`, or None. blank: (R,) bool, the rows that are unconditional themselves
    (prompt dropout in pretraining).
    """
    t = self.config.templates
    ids, mask = without_eos(prompt, t.eos_id)
    # Longer prompts are truncated, as in the original.
    ids, mask = ids[:, : self.config.prompt_tokens], mask[:, : self.config.prompt_tokens]
    before, after = t.generation_prefix, t.generation_suffix[:-1]
    shown = None
    if dropped is not None:
      keep = kept_words(dropped.keys, mask, dropped.share)
      if dropped.way == 'delete':
        ids, mask = compacted(ids, mask & keep)
      elif dropped.way == 'mask':
        ids = jnp.where(keep, ids, self.config.mask_id)
      else:  # 'hide': it keeps its position, but no other token sees it
        ends = ((0, 0), (len(before), len(after)))
        shown = jnp.pad(keep | ~mask, ends, constant_values=True)
    ids, length = spliced(before, ids, mask, after, pad_id=t.pad_id)
    nothing = jnp.asarray([*before, *after], jnp.int32)
    unconditional = jnp.pad(nothing, (0, ids.shape[1] - len(nothing)), constant_values=t.pad_id)
    if blank is not None:
      ids = jnp.where(blank[:, None], unconditional, ids)
      length = jnp.where(blank, len(nothing), length)
    if guided:

      def paired(x, other):
        return jnp.stack([x, jnp.broadcast_to(other, x.shape)], axis=1).reshape(-1, *x.shape[1:])

      ids, length = paired(ids, unconditional), paired(length, len(nothing))
      shown = None if shown is None else paired(shown, True)
    embeds = self.language_model.embed_tokens(ids)
    return self.language_model.prefill(embeds, length, shown=shown, remat=remat)

  def _understanding_prefix(self, codes, question: Text, *, remat: bool = False):
    """codes: (R, N), question: (R, T) -> the prefix of R rows, in which the image's tokens attend
    to each other.
    """
    t = self.config.templates
    before = self._fixed(t.understanding_prefix, codes.shape[0])
    tail, length = spliced(
      t.understanding_infix,
      question.ids,
      question.mask,
      t.understanding_suffix[:-1],
      pad_id=t.pad_id,
    )
    head = jnp.concatenate([before, codes + self.config.first_code], axis=1)
    embeds = self.language_model.embed_tokens(jnp.concatenate([head, tail], axis=1))
    # The infix begins with eoi, which belongs to the image.
    return self.language_model.prefill(
      embeds, length + head.shape[1], full=head.shape[1] + 1, remat=remat
    )

  # Images after a prefix.

  def _block(self, prefix, inputs, *, remat: bool = False):
    """inputs (R, C, N): rows of the vocabulary, codes or the mask token -> states (R, C, N, D);
    state k predicts code k.
    """
    t = self.config.templates
    ends = ((0, 0), (0, 0), (1, 1))
    ids = jnp.pad(inputs, ends, constant_values=t.eoi_id).at[..., 0].set(t.soi_id)
    embeds = self.language_model.embed_tokens(ids)
    hidden = self.language_model.extend(prefix, embeds, causal=False, remat=remat)
    return hidden[:, :, 1:-1]

  def _mixed(self, guidance: float):
    """A function: states (B, branches, ..., D) -> logits (B, ..., K), with the branches joined."""

    def logits(hidden):
      logits = self.code_logits(hidden)
      return guide(logits, guidance, axis=1) if hidden.shape[1] == 2 else logits[:, 0]

    return logits

  # Sampling: the prefix once per group, then the block once per step.

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    inputs, group = keys.shape
    total = self.config.num_codes
    branches = 1 if how.guidance == 1.0 else 2
    prefix = self._generation_prefix(prompt, branches == 2)
    steps = self.config.sampling_steps
    plan = maskgit.schedule(total, steps, self.config.sampling_noise)

    def propose(known, codes, step):
      """Codes (B, G, N) and their log-probabilities, for every position."""
      now = jnp.where(known, codes + self.config.first_code, self.config.mask_id)
      now = jnp.repeat(now, branches, axis=0)  # both branches read the same codes
      hidden = self._block(prefix, now).reshape(inputs, branches, group, total, -1)
      return self._propose(hidden, keys, step, how)

    def body(drawn, now):
      step, masked, noise = now
      codes, logps = propose(drawn.known, drawn.codes, step)
      codes = jnp.where(drawn.known, drawn.codes, codes)
      gumbel = maskgit.noise_of(keys, SURENESS + step, total) if how.temperature else 0.0
      sure = maskgit.sureness(logps, drawn.known, gumbel, noise)
      # After the last step nothing is masked again, so its proposals are final.
      again = maskgit.least_sure(sure, masked) & (step < steps - 1)
      logps = jnp.where(drawn.known, drawn.logps, logps)
      return _Drawing(drawn.known | ~again, codes, logps), None

    shape = (inputs, group, total)
    nothing = _Drawing(
      jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    )
    with jax.named_scope('unmask'):
      drawn, _ = jax.lax.scan(body, nothing, (jnp.arange(steps), *map(jnp.asarray, plan)))
    return drawn.codes, drawn.logps

  def _propose(self, hidden, keys, step, how: Sampling):
    """hidden (B, branches, G, N, D) -> codes and log-probabilities (B, G, N), `how.chunk` positions
    at a time, because all logits of a step may take gigabytes.
    """
    total = self.config.num_codes
    logits = self._mixed(how.guidance)

    def draw(hidden, first):
      places = jnp.arange(hidden.shape[-2]) + first + step * total

      def at_places(key):
        return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

      return sample_tokens(logits(hidden), jax.vmap(jax.vmap(at_places))(keys), 0, how.temperature)

    chunk = how.chunk
    if not chunk or chunk >= total:
      return draw(hidden, 0)
    count = -(-total // chunk)
    room = [(0, 0)] * 3 + [(0, count * chunk - total), (0, 0)]
    parts = jnp.pad(hidden, room).reshape(*hidden.shape[:3], count, chunk, -1)
    parts = jnp.moveaxis(parts, 3, 0)
    drawn = jax.lax.map(lambda part: draw(*part), (parts, jnp.arange(count) * chunk))
    return tuple(
      jnp.moveaxis(x, 0, -2).reshape(*keys.shape, count * chunk)[..., :total] for x in drawn
    )

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    # The image and the question run once for the whole group.
    return self._write(self._understanding_prefix(self._codes(picture), question), keys, how)

  def _write(self, prefix: Prefix, keys, how: Sampling):
    """Texts after R prefixes: keys (R, G) -> Text (R, G, T), logps (R, G, T)."""
    # The kernel of `decoder.make` does not support this kind of block.
    decoder = decoder_lib.Decoder(
      self.language_model,
      prefix,
      candidates=keys.shape[1],
      tokens=how.max_tokens,
      scan=how.scan,
    )
    embed = self.language_model.embed_tokens
    ids, logps, mask = texts.write(
      decoder, embed, self.text_logits, keys, how, self.config.templates
    )
    return Text(ids, mask), logps

  # Questions about images: the image once, then each question after it.

  def read(self, pictures: Picture, mask) -> Prefix:
    """See the protocol; one image per row."""
    codes = self._codes(pictures)
    assert codes.shape[1] == 1, codes.shape
    del mask  # there is always one image
    t = self.config.templates
    ids = jnp.concatenate(
      [
        self._fixed(t.understanding_prefix, codes.shape[0]),
        codes[:, 0] + self.config.first_code,
        self._fixed(t.understanding_infix[:1], codes.shape[0]),
      ],
      axis=1,
    )
    length = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
    embeds = self.language_model.embed_tokens(ids)
    return self.language_model.prefill(embeds, length, full=ids.shape[1])

  def answer(self, reading: Prefix, question: Text, keys, how: Sampling):
    write = functools.partial(self._write, how=how)
    t = self.config.templates
    infix = t.understanding_infix[1:]  # its first token is the end of the reading
    return texts.answer(self.language_model, reading, question, keys, write, t, infix=infix)

  def _fixed(self, ids, rows: int):
    """The same ids in every row, (rows, n)."""
    return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (rows, len(ids)))

  # Likelihoods.

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring, *, blank=None) -> TokenScores:
    """See the protocol; the result is an estimate (docs/showo.md).

    `how.picture_likelihood`:
      one_step: masks all positions and takes the probabilities of all codes at once. It shows which
        codes a prompt makes likely at each position, but not whether they fit together.
      elbo: masks a random part of the positions and shows the rest: the bound of masked diffusion,
        the mean of `how.elbo_draws` draws. In each draw, positions that are not masked count 0, and
        the others are weighted to make up for that.

    `how.prompt_drop` drops tokens of the prompt at random. keys (B,): needed for both.
    blank (R,) bool replaces whole prompts with the unconditional one (pretraining only).
    """
    per_input = prompt.ids.shape[1]
    prompt, (codes,), (inputs, rows, group) = pair_up(prompt, (codes,))
    dropped = None
    if keys is not None:
      keys = jnp.repeat(keys, per_input, axis=0)  # one per row
      if how.prompt_drop:
        dropped = _Dropped(_folded(keys, WORDS), how.prompt_drop, how.prompt_drop_way)
    branches = 1 if how.guidance == 1.0 else 2
    prefix = self._generation_prefix(
      prompt, branches == 2, dropped=dropped, blank=blank, remat=how.remat
    )
    estimate = self._bound if how.picture_likelihood == 'elbo' else self._one_step
    scores = estimate(prefix, codes, keys, how, branches)
    return TokenScores(*(x.reshape(inputs, group, -1) for x in scores))

  def masked_logps(self, prompt: Text, codes, masked, how: Scoring, *, blank=None) -> TokenScores:
    """Log-probabilities of partly masked images, for pretraining: prompt (B, T), codes and masked
    (B, N) -> TokenScores (B, N), 0 where a code was shown.

    blank (B,) bool replaces whole prompts with the unconditional one.
    """
    prefix = self._generation_prefix(prompt, False, blank=blank, remat=how.remat)
    scores = self._masked(prefix, codes[:, None], masked[:, None], how, 1)
    return TokenScores(*(x[:, 0] for x in scores))

  def _masked(self, prefix, codes, masked, how: Scoring, branches: int) -> TokenScores:
    """codes and masked (R, C, N) -> scores (R, C, N) of the masked codes, given the rest."""
    inputs = jnp.where(masked, self.config.mask_id, codes + self.config.first_code)
    hidden = self._block(prefix, jnp.repeat(inputs, branches, axis=0), remat=how.remat)
    return token_scores(
      hidden.reshape(codes.shape[0], branches, *hidden.shape[1:]),
      self._mixed(how.guidance),
      codes,
      masked,
      temperature=how.temperature,
      chunk=how.chunk,
    )

  def _one_step(self, prefix, codes, keys, how: Scoring, branches: int) -> TokenScores:
    """codes (R, C, N) -> (R, C, N). All positions are masked, so one row serves all candidates."""
    del keys
    rows, _, total = codes.shape
    inputs = jnp.full((rows * branches, 1, total), self.config.mask_id, codes.dtype)
    hidden = self._block(prefix, inputs, remat=how.remat).reshape(rows, branches, total, -1)
    return token_scores(
      hidden,
      self._mixed(how.guidance),
      codes,
      jnp.ones(codes.shape, bool),
      temperature=how.temperature,
      chunk=how.chunk,
      shared=True,
    )

  def _bound(self, prefix, codes, keys, how: Scoring, branches: int) -> TokenScores:
    """codes (R, C, N) -> (R, C, N). A draw masks the same positions for all candidates of a row."""
    total = codes.shape[-1]

    def draw(_, index):
      masked, count = jax.vmap(functools.partial(masked_places, total=total))(
        _folded(keys, DRAWS + index)
      )
      masked = jnp.broadcast_to(masked[:, None], codes.shape)
      scores = self._masked(prefix, codes, masked, how, branches)
      weight = (total / count)[:, None, None]
      return None, TokenScores(*(weight * x for x in scores))

    _, scores = jax.lax.scan(draw, None, jnp.arange(how.elbo_draws))
    return TokenScores(*(jnp.mean(x, axis=0) for x in scores))

  def text_logps(
    self, picture: Picture, question: Text, text: Text, keys, how: Scoring
  ) -> TokenScores:
    del keys  # the likelihood of a text is exact
    codes = self._codes(picture)
    per_input = codes.shape[1]
    codes, (ids, mask), (inputs, _, group) = pair_up(codes, (text.ids, text.mask))
    question = Text(*(jnp.repeat(x, per_input, axis=0) for x in question))
    scores = texts.score(
      self.language_model,
      self._understanding_prefix(codes, question, remat=how.remat),
      self.text_logits,
      ids,
      mask,
      how,
      self.config.templates,
    )
    return TokenScores(*(x.reshape(inputs, group, -1) for x in scores))


class _Drawing(NamedTuple):
  """A partly drawn image, (B, G, N) each: which positions are fixed, their codes, and each code's
  log-probability when it was fixed.
  """

  known: jax.Array
  codes: jax.Array
  logps: jax.Array


class _Dropped(NamedTuple):
  """keys (R,), the share of tokens to drop, and how to drop them."""

  keys: jax.Array
  share: float
  way: str


def kept_words(keys, mask, share: float):
  """Which tokens of prompts to keep: keys (R,), mask (R, T) of the tokens -> (R, T) bool. Each is
  dropped with probability `share`, but at least one token of every prompt is kept.
  """

  def draw(key):
    # One key per position, so that the choice does not depend on padding.
    places = jnp.arange(mask.shape[-1])
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(places)

  luck = jnp.where(mask, jax.vmap(draw)(keys), -1.0)
  luckiest = jnp.arange(mask.shape[-1]) == jnp.argmax(luck, axis=-1, keepdims=True)
  return (luck >= share) | luckiest


def masked_places(key, *, total: int):
  """A key -> (N,) bool, the masked positions of a draw of the bound, and their number, which is
  uniform in 1 to N.
  """
  of_count, of_places = jax.random.split(key)
  count = jax.random.randint(of_count, (), 1, total + 1)
  return maskgit.least_sure(jax.random.uniform(of_places, (total,)), count), count


def _folded(keys, number):
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def spec_of(config: ShowoConfig) -> Spec:
  """The `Spec` of a model of these sizes."""
  t = config.templates
  return Spec(
    eos_id=t.eos_id if t else -1,
    num_codes=config.num_codes,
    codebook_size=config.vq.num_embeddings,
    image_size=config.image_size,
    reads='codes',
    likelihood_is_random=True,
    sampler_is_exact=False,
    prompt_tokens=config.prompt_tokens,
    prompt_drop=PROMPT_DROP,
    sampling_steps=config.sampling_steps,
    sampling_noise=config.sampling_noise,
    as_prompt=t.as_prompt if t else b'',
    as_answer=t.as_answer if t else b'',
  )


# (config, seed) -> (graphdef, params); config -> shapes; config -> graphdef.
create = functools.partial(structure.create, Showo)
abstract_params = functools.partial(structure.abstract_params, Showo)
graphdef_of = functools.partial(structure.graphdef_of, Showo)
