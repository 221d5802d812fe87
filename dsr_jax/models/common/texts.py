"""Texts after a prefix: written token by token, and scored whole.

What stands before a text is split before its last token, which starts every candidate; so the
state at place t predicts token t.
Axes: B inputs, R prefixes (rows), C candidates of a prefix, G candidates of an input, T text
tokens, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.models.common.logprobs import TokenScores, token_scores
from dsr_jax.models.common.sampling import sample_tokens


def write(decoder, embed, logits_fn, keys, how, *, start_id: int, eos_id: int, pad_id: int):
  """Samples a text a candidate, until its end-of-text token or `how.max_tokens`.

  Args:
    decoder: of `decoder.make`, C = G candidates of B prefixes.
    embed: ids (...) -> (..., D).
    logits_fn: states (B, G, D) -> (B, G, V).
    keys: (B, G).
    how: `unified.Sampling`.
    start_id: the last token before the text.

  Returns:
    ids (B, G, T), padded after the end; log-probabilities (B, G, T), 0 there; mask (B, G, T).
  """
  inputs, group = keys.shape

  def body(carry, index, room):
    hidden, cache = decoder.step(carry.embeds, carry.cache, index, room)
    ids, logps = sample_tokens(logits_fn(hidden), keys, index, how.temperature)
    ids = jnp.where(carry.ended, pad_id, ids)
    written = ids, jnp.where(carry.ended, 0.0, logps), ~carry.ended
    return _Writing(embed(ids), carry.ended | (ids == eos_id), cache), written

  def go_on(carry, first, end):
    with jax.named_scope('decode'):
      return jax.lax.scan(functools.partial(body, room=end), carry, jnp.arange(first, end))

  def skip(carry, first, end):
    shape = (end - first, inputs, group)
    nothing = jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
    return carry, nothing

  start = embed(jnp.asarray(start_id))
  carry = _Writing(
    embeds=jnp.broadcast_to(start, (inputs, group, start.shape[-1])),
    ended=jnp.zeros((inputs, group), bool),
    cache=None,
  )
  parts = []
  for first in range(0, how.max_tokens, how.segment):
    end = min(first + how.segment, how.max_tokens)
    carry = carry._replace(cache=decoder.grow(carry.cache, end - first))
    run = functools.partial(go_on, first=first, end=end)
    if first:  # once every text has ended, a segment is skipped
      leave = functools.partial(skip, first=first, end=end)
      carry, part = jax.lax.cond(jnp.all(carry.ended), leave, run, carry)
    else:
      carry, part = run(carry)
    parts.append(part)
  return tuple(joined(x) for x in zip(*parts))


def score(language_model, prefix, logits_fn, ids, mask, how, *, start_id: int) -> TokenScores:
  """Log-probabilities of texts, ids and mask (R, C, T), after `prefix` -> (R, C, T)."""
  # Inputs are the text shifted by one, the last token before it first.
  start = jnp.full((*ids.shape[:2], 1), start_id, ids.dtype)
  shifted = jnp.concatenate([start, ids[..., :-1]], axis=-1)
  embeds = language_model.embed_tokens(shifted)
  hidden = language_model.extend(prefix, embeds, remat=how.remat)
  return token_scores(hidden, logits_fn, ids, mask, temperature=how.temperature, chunk=how.chunk)


def joined(parts):
  """Outputs of a decode loop, (tokens, B, G) a piece -> (B, G, all tokens)."""
  return jnp.moveaxis(jnp.concatenate(parts, axis=0), 0, -1)


class _Writing(NamedTuple):
  """The loop's carry: the last tokens' embeddings (B, G, D); ended (B, G): whose end of text has
  come; the cache.
  """

  embeds: jax.Array
  ended: jax.Array
  cache: Any
