"""Token ids around content whose length is known only on the device.

Axes: R rows, T content tokens, P tokens in total.
"""

import jax.numpy as jnp


def spliced(before, ids, mask, after, *, pad_id: int):
  """Puts ids `before` and `after` left-justified content (R, T), without a gap.

  before, after: tuples of ints, or ids (n,). Returns ids (R, P), padded on the right, and lengths
  (R,).
  """
  rows, room = ids.shape
  length = jnp.sum(mask, axis=-1).astype(jnp.int32)
  # Position 0 is the content's first token; the position of the tail depends on the row's length.
  place = jnp.arange(len(before) + room + len(after)) - len(before)
  tail = jnp.asarray(_with_pad(after, pad_id), jnp.int32)
  place_in_tail = jnp.clip(place - length[:, None], 0, len(after))
  if room == 0:  # no content at all, for example an empty instruction
    inside = jnp.full((rows, len(place)), pad_id, jnp.int32)
  else:
    inside = jnp.take(ids, jnp.clip(place, 0, room - 1), axis=-1)
  out = jnp.where(place < length[:, None], inside, tail[place_in_tail])
  if len(before):
    head = jnp.broadcast_to(jnp.asarray(before, jnp.int32), (rows, len(before)))
    out = jnp.concatenate([head, out[:, len(before) :]], axis=-1)
  return out, length + len(before) + len(after)


def compacted(ids, mask):
  """Content (R, T) with gaps where mask is False -> left-justified content and mask."""
  order = jnp.argsort(~mask, axis=-1, stable=True)
  return jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(mask, order, axis=-1)


def _with_pad(after, pad_id):
  return (*after, pad_id) if isinstance(after, tuple) else jnp.append(after, pad_id)
