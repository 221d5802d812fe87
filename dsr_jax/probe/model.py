"""What the probe asks of a model: samples with their self-rewards, token log-probabilities, and the
same without the condition.

Knows the model through the protocol alone. Everything runs in chunks of one shape and comes back as
NumPy.
Axes: B inputs of a chunk, P inputs, G candidates, M other pictures, K instructions, T text tokens,
  N image codes, H W pixels.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys
from dsr_jax.rewards import base as rewards


class Drawn(NamedTuple):
  """Pictures of P prompts. In nats: R_G by instruction, log p of the prompt's tokens given each
  picture (the first instruction), log p and entropy of the codes under the policy, log p of the
  codes without a prompt."""

  codes: np.ndarray  # (P, G, N)
  pixels: np.ndarray  # (P, G, H, W, 3) uint8
  rewards: np.ndarray  # (P, K, G)
  text_logps: np.ndarray  # (P, G, T)
  code_logps: np.ndarray  # (P, G, N)
  code_entropy: np.ndarray  # (P, G, N)
  bare_logps: np.ndarray  # (P, G, N)


class Told(NamedTuple):
  """Texts about P pictures. In nats: R_U, entropy of the tokens under the policy, log p of the
  picture's codes given no text.
  """

  codes: np.ndarray  # (P, N)
  ids: np.ndarray  # (P, G, T)
  mask: np.ndarray  # (P, G, T)
  rewards: np.ndarray  # (P, G)
  entropy: np.ndarray  # (P, G, T)
  bare_logps: np.ndarray  # (P, N)


class Prober:
  """A model on its device. method, system: as a run would have them (temperature, guidance, group,
  compute dtype, chunks).
  """

  def __init__(self, graphdef, params, processor, method, system, seed: int):
    def cast(x):
      return jnp.asarray(x, system.compute_dtype)

    # As in a run: float32 for the VQ model alone, whose codes flip at small errors.
    self._params = {
      k: jax.tree.map(jnp.asarray if k == 'vqmodel' else cast, v) for k, v in params.items()
    }
    self._method, self._processor, self._seed = method, processor, seed
    self._chunk = system.rollout_chunk or method.inputs_per_task
    self._plain = Scoring(chunk=system.logprob_chunk)
    self._policy = Scoring(temperature=method.temperature, chunk=system.logprob_chunk)
    self._bare = Scoring(
      guidance=0.0, chunk=system.logprob_chunk
    )  # guidance 0 is the unconditional branch alone
    eos = processor.templates.eos_id
    how = Sampling(
      temperature=method.temperature,
      guidance=method.guidance,
      max_tokens=method.max_text_tokens,
      cfg_interval=method.cfg_interval,
    )

    def model_of(params):
      return nnx.merge(graphdef, params)

    counted = eos if method.eos_in_reward else None

    def draw(params, prompt, index, instructions):
      model, keys = model_of(params), self._keys(index)
      codes, _ = model.sample_pictures(prompt, keys, how)
      pictures = model.picture_from_codes(codes)
      read = [
        rewards.generation(
          model, pictures, prompt, Text(*one), self._plain, eos_id=counted, keys=keys
        )
        for one in zip(*instructions)
      ]
      asked = Text(prompt.ids[:, None], prompt.mask[:, None])
      own = model.picture_logps(asked, codes, keys, self._policy)
      bare = model.picture_logps(asked, codes, keys, self._bare)
      found = jnp.stack([r for r, _ in read], axis=1)
      return (
        codes,
        pictures.pixels,
        found,
        read[0][1][..., : prompt.ids.shape[-1]],
        own.logp,
        own.entropy,
        bare.logp,
      )

    def tell(params, pixels, question, index):
      model, keys = model_of(params), self._keys(index)
      picture = model.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0)
      texts, _ = model.sample_texts(picture, question, keys, how)
      found, _ = rewards.understanding(
        model, picture.codes, texts, self._plain, eos_id=eos, keys=keys
      )
      own = model.text_logps(
        Picture(*(x[:, None] for x in picture)), question, texts, keys, self._policy
      )
      bare = model.picture_logps(
        Text(*(x[:, None] for x in question)), picture.codes[:, None], keys[:, :1], self._bare
      )
      return picture.codes, texts.ids, texts.mask, found, own.entropy, bare.logp[:, 0]

    def read(params, prompt, codes, index, instruction):
      model = model_of(params)
      return rewards.generation(
        model,
        model.picture_from_codes(codes),
        prompt,
        Text(*instruction),
        self._plain,
        keys=self._keys(index)[:, :1],
      )[1]

    def both(params, text, codes, index, instruction):
      model, keys = model_of(params), self._keys(index)[:, :1]
      pictures = model.picture_from_codes(codes[:, None])
      given_picture, _ = rewards.generation(
        model, pictures, text, Text(*instruction), self._plain, keys=keys
      )
      given_text = model.picture_logps(
        Text(text.ids[:, None], text.mask[:, None]), codes[:, None], keys, self._plain
      )
      return given_picture[:, 0], given_text.logp[:, 0]

    def tokenize(params, pixels):
      return model_of(params).picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0).codes

    self._draw, self._tell, self._read, self._both, self._tokenize = map(
      jax.jit, (draw, tell, read, both, tokenize)
    )

  def _keys(self, index):
    """index (B,): an input's place in the list -> one key a candidate (B, G)."""
    group = self._method.group_size
    key = jax.random.key(self._seed)
    return jax.vmap(lambda i: row_keys(key, i * group, 1, group)[0])(index)

  def _instructions(self, sentences):
    ids = self._processor.pad([self._processor.encode_question(s) for s in sentences])
    return ids.ids, ids.mask

  def draw(self, ids, mask, instructions) -> Drawn:
    """Prompts (P, T) of token ids and K sentences -> pictures and everything about them."""
    asked = self._instructions(instructions)
    found = self._chunked(
      lambda ids, mask, index: self._draw(self._params, Text(ids, mask), index, asked), ids, mask
    )
    return Drawn(found[0], processor_lib.to_uint8(found[1]), *found[2:])

  def tell(self, pixels, question_ids, question_mask) -> Told:
    """Pictures (P, H, W, 3) uint8 and what is asked about them (P, T) -> texts and everything about
    them.
    """

    def run(pixels, ids, mask, index):
      return self._tell(self._params, pixels, Text(ids, mask), index)

    return Told(*self._chunked(run, pixels, question_ids, question_mask))

  def read(self, ids, mask, codes, instruction: str) -> np.ndarray:
    """Prompts (P, T), pictures (P, M, N) -> log p of the prompt's tokens given each picture (P, M,
    T).
    """
    asked = tuple(x[0] for x in self._instructions([instruction]))
    return self._chunked(
      lambda ids, mask, codes, index: self._read(
        self._params, Text(ids, mask), codes, index, asked
      ),
      ids,
      mask,
      codes,
    )

  def both(self, texts, codes, instruction: str):
    """R texts in words and R pictures (R, N) -> R_G of each pair (R,) and log p of the codes given
    the text (R, N).
    """
    asked = tuple(x[0] for x in self._instructions([instruction]))
    ids = [self._processor.encode_prompt(t) for t in texts]
    text = self._processor.pad(ids, -(-max(map(len, ids)) // 16) * 16)  # few lengths, few programs
    return self._chunked(
      lambda ids, mask, codes, index: self._both(
        self._params, Text(ids, mask), codes, index, asked
      ),
      *text,
      np.asarray(codes),
    )

  def tokenize(self, pixels) -> np.ndarray:
    """(P, H, W, 3) uint8 -> codes (P, N)."""
    return self._chunked(lambda pixels, index: self._tokenize(self._params, pixels), pixels)

  def _chunked(self, run, *arrays):
    """run(*parts, index) over parts of `chunk` rows, the last one filled up with copies of its
    first row.
    """
    rows, out = len(arrays[0]), []
    chunk = min(self._chunk, rows)
    for first in range(0, rows, chunk):
      parts = [np.asarray(a[first : first + chunk]) for a in arrays]
      here = len(parts[0])
      parts = [np.concatenate([p, np.repeat(p[:1], chunk - here, axis=0)]) for p in parts]
      found = jax.device_get(run(*parts, np.arange(first, first + chunk)))
      out.append(jax.tree.map(lambda x, n=here: x[:n], found))
    return jax.tree.map(lambda *x: np.concatenate(x), *out)
