"""The project's only log-probability function: rewards, losses and reports all use it.

Axes: ... any leading axes, T tokens, D width, V vocabulary (of text or of image codes).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax import sharding


class TokenScores(NamedTuple):
  """logp and entropy, both (..., T) float32 in nats; 0 where masked."""

  logp: jax.Array
  entropy: jax.Array


def log_softmax(logits, temperature: float = 1.0):
  """logits: (..., V) -> float32 log-probabilities at this temperature; temperature 0 (greedy) uses
  1.
  """
  logits = sharding.split_vocabulary(logits)
  return jax.nn.log_softmax(
    logits.astype(jnp.float32) / (temperature or 1.0), axis=-1
  )  # float32 island


def guide(logits, weight: float, axis: int):
  """Classifier-free guidance in float32: uncond + weight * (cond - uncond), Janus' convention (1 is
  no guidance).

  logits: conditional at index 0 and unconditional at index 1 of `axis`, which is removed.
  """
  cond, uncond = (
    jax.lax.index_in_dim(logits, i, axis, keepdims=False).astype(jnp.float32) for i in (0, 1)
  )
  return uncond + weight * (cond - uncond)


def token_scores(
  hidden,
  logits_fn,
  targets,
  mask,
  *,
  temperature: float = 1.0,
  chunk: int = 0,
  shared: bool = False,
) -> TokenScores:
  """Log-probability and entropy of each target, without holding all logits at once.

  Args:
    hidden: (..., T, D), the states that predict the targets.
    logits_fn: (..., t, D) -> (..., t, V); leading axes may shrink (guidance joins two branches).
    targets: (..., T) int32.
    mask: (..., T) bool.
    temperature: the temperature at which the targets were sampled.
    chunk: tokens at a time; 0: all. Chunks are recomputed in the backward pass.
    shared: one state serves all candidates: logits (R, t, V), targets (R, C, T).
  """

  def score(hidden, targets):
    logp = log_softmax(logits_fn(hidden), temperature)
    if shared:
      entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)[:, None]
      return sharding.pick_each(logp, targets), jnp.broadcast_to(entropy, targets.shape)
    return sharding.pick(logp, targets), -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  length = targets.shape[-1]
  if not chunk or chunk >= length:
    picked, entropy = score(hidden, targets)
  else:
    count = -(-length // chunk)
    pad = count * chunk - length

    def widen(x, axis):
      return jnp.pad(x, [(0, pad if a == axis % x.ndim else 0) for a in range(x.ndim)])

    def split(x, axis):
      return jnp.moveaxis(
        x.reshape(*x.shape[: axis % x.ndim], count, chunk, *x.shape[axis % x.ndim + 1 :]),
        axis % x.ndim,
        0,
      )

    chunks = split(widen(hidden, -2), -2), split(widen(targets, -1), -1)
    scored = jax.lax.map(lambda c: jax.checkpoint(score)(*c), chunks)  # over T, an unsharded axis
    picked, entropy = (
      jnp.moveaxis(x, 0, -2).reshape(*targets.shape[:-1], -1)[..., :length] for x in scored
    )
  return TokenScores(jnp.where(mask, picked, 0.0), jnp.where(mask, entropy, 0.0))
