"""Texts after a prefix: sampled token by token, and scored as a whole.

The tokens before a text are split before the last one, which starts every candidate, so the state
at position t predicts token t.
Axes: B inputs, R prefixes (rows), C candidates of a prefix, G candidates of an input, Q questions
about an input, T text tokens, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.models.common.logprobs import TokenScores, token_scores
from dsr_jax.models.common.sampling import sample_tokens
from dsr_jax.models.common.splice import spliced


def write(decoder, embed, logits_fn, keys, how, templates):
  """Samples one text per candidate, until its end-of-text token or `how.max_tokens`.

  Args:
    decoder: from `decoder.make`, C = G candidates of B prefixes.
    embed: ids (...) -> (..., D).
    logits_fn: states (B, G, D) -> (B, G, V).
    keys: (B, G).
    how: `unified.Sampling`.
    templates: the model's. The last token of its `understanding_suffix` starts a text.

  Returns:
    ids (B, G, T), padded after the end; log-probabilities (B, G, T), 0 there; mask (B, G, T).
  """
  inputs, group = keys.shape
  eos_id, pad_id = templates.eos_id, templates.pad_id

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

  start = embed(jnp.asarray(templates.understanding_suffix[-1]))
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
    if first:  # a segment is skipped once every text has ended
      leave = functools.partial(skip, first=first, end=end)
      carry, part = jax.lax.cond(jnp.all(carry.ended), leave, run, carry)
    else:
      carry, part = run(carry)
    parts.append(part)
  return tuple(joined(x) for x in zip(*parts))


def answer(language_model, reading, question, keys, write_after, templates, *, infix=()):
  """Samples one answer per question; see `unified.UnifiedModel.answer`.

  Args:
    reading: the prefix of B rows that a row's questions share.
    question: ids and mask (B, Q, Tq).
    keys: (B, Q).
    write_after: (prefix of B Q rows, keys (B Q, 1)) -> arrays (B Q, 1, T).
    infix: ids between the reading and the question.

  Returns:
    The results of `write_after`, (B, Q, T) each.
  """
  inputs, questions = keys.shape
  ids, length = spliced(
    infix,
    question.ids.reshape(inputs * questions, -1),
    question.mask.reshape(inputs * questions, -1),
    templates.understanding_suffix[:-1],
    pad_id=templates.pad_id,
  )
  embeds = language_model.embed_tokens(ids).reshape(inputs, questions, ids.shape[1], -1)
  prefix = language_model.prefill_on(reading, embeds, length.reshape(inputs, questions))
  answers = write_after(prefix, keys.reshape(-1, 1))
  return jax.tree.map(lambda x: x.reshape(inputs, questions, -1), answers)


def score(language_model, prefix, logits_fn, ids, mask, how, templates) -> TokenScores:
  """Log-probabilities of texts, ids and mask (R, C, T), after `prefix` -> (R, C, T)."""
  # The inputs are the text shifted by one, starting with the last token before it.
  start = jnp.full((*ids.shape[:2], 1), templates.understanding_suffix[-1], ids.dtype)
  shifted = jnp.concatenate([start, ids[..., :-1]], axis=-1)
  embeds = language_model.embed_tokens(shifted)
  hidden = language_model.extend(prefix, embeds, remat=how.remat)
  return token_scores(hidden, logits_fn, ids, mask, temperature=how.temperature, chunk=how.chunk)


def joined(parts):
  """Outputs of a decode loop, (tokens, B, G) per segment -> (B, G, all tokens)."""
  return jnp.moveaxis(jnp.concatenate(parts, axis=0), 0, -1)


class _Writing(NamedTuple):
  """The loop's carry: the embeddings (B, G, D) of the last tokens; ended (B, G): texts that have
  ended; the cache.
  """

  embeds: jax.Array
  ended: jax.Array
  cache: Any
