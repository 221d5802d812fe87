"""Runs prefixes and candidates through a transformer. The G candidates of a group share their
prefix.

`prefill` runs a prefix (a prompt, or an image and a question) once; its keys and values then serve
every candidate of the group, both as a whole (`extend`) and token by token (models/common/
decoder.py), under one softmax over all parts. Right padding of a prefix is masked where it is read;
right padding of a candidate is never seen, because attention is causal.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, T candidate tokens, D width, N
heads, h head width, L layers. Keys and values are (R, N, ..., tokens, h): batch axes first, so that
attention is a plain batched matrix product.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.attention import attend
from dsr_jax.models.common.layers import scan_layers
from dsr_jax.models.common.prefix import Prefix, prefix_mask


class Trunk(nnx.Module):
  """A language model without its heads. A subclass defines `layers` (stacked blocks, called as
  `block(x, at, attend_fn)`), `norm`, and `rotary_at(positions, limit)`.
  """

  def prefill(self, embeds, length, *, full: int = 0, shown=None, remat: bool = False) -> Prefix:
    """Runs prefixes and keeps their keys and values.

    embeds: (R, P, D), right-padded to P. length: (R,). full: this many tokens, from the first, all
    attend to each other; the rest is causal. shown: (R, P) bool, False for tokens that no other
    token sees; None: all are seen.
    """
    p = embeds.shape[1]
    at = self.rotary_at(jnp.arange(p)[None], p)  # one row serves all
    visible = jnp.tril(jnp.ones((p, p), bool))
    if full:
      visible |= jnp.arange(p) < full
    if shown is not None:
      visible = visible & (shown[:, None, None, None, :] | jnp.eye(p, dtype=bool))

    def body(block, x, _):
      kept = []

      def attend_fn(q, k, v):
        kept.append((k[:, :, 0], v[:, :, 0]))
        return attend(q, [(k, v, visible)])

      return block(x, at, attend_fn), kept[0]

    _, (k, v) = scan_layers(self.layers, body, sharding.split_rows(embeds[:, None]), remat=remat)
    return Prefix(k, v, length, shown)

  def prefill_on(self, prefix: Prefix, embeds, length) -> Prefix:
    """Extends each of R prefixes in C ways, and keeps all keys and values.

    embeds: (R, C, T, D), right-padded to T; length: (R, C). Returns a prefix of R C rows and P + T
    positions. The shared part is computed once and then copied, so that each row decodes
    independently.
    """
    rows, ways, t, _ = embeds.shape
    room = prefix.k.shape[-2] + t
    at = self.rotary_at(prefix.length[:, None] + jnp.arange(t), room)
    causal = jnp.tril(jnp.ones((t, t), bool))
    seen = prefix_mask(prefix)

    def body(block, x, kv):
      kept = []

      def attend_fn(q, k, v):
        kept.append((k, v))
        return attend(q, [(*kv, seen), (k, v, causal)])

      return block(x, at, attend_fn), kept[0]

    _, own = scan_layers(self.layers, body, sharding.split_rows(embeds), (prefix.k, prefix.v))

    def joined(shared, own):
      """shared (L, R, N, P, h), own (L, R, N, C, T, h) -> (L, R C, N, P + T, h), without a gap."""
      shared = jnp.pad(shared, ((0, 0), (0, 0), (0, 0), (0, t), (0, 0)))
      shared = jnp.broadcast_to(shared[:, :, None], (*shared.shape[:2], ways, *shared.shape[2:]))
      put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
      out = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)(
        shared, jnp.moveaxis(own, 3, 2), prefix.length
      )
      return sharding.split_heads(
        out.reshape(out.shape[0], rows * ways, *out.shape[3:]), stacked=True
      )

    length = (prefix.length[:, None] + length).ravel()
    shown = prefix.shown
    if shown is not None:  # all new tokens are seen
      shown |= jnp.arange(shown.shape[1]) >= prefix.length[:, None]
      shown = jnp.repeat(jnp.pad(shown, ((0, 0), (0, t)), constant_values=True), ways, axis=0)
    return Prefix(joined(prefix.k, own[0]), joined(prefix.v, own[1]), length, shown)

  def extend(self, prefix: Prefix, embeds, *, causal: bool = True, remat: bool = False):
    """Runs candidates after a shared prefix: causal ones, whose state t predicts what follows token
    t (teacher forcing), or blocks whose tokens all attend to each other.

    embeds: (R, C, T, D) -> final-norm states (R, C, T, D).
    """
    t = embeds.shape[2]
    at = self.rotary_at(prefix.length[:, None] + jnp.arange(t), prefix.k.shape[-2] + t)
    own = jnp.tril(jnp.ones((t, t), bool)) if causal else None
    seen = prefix_mask(prefix)

    def body(block, x, kv):
      return block(x, at, lambda q, k, v: attend(q, [(*kv, seen), (k, v, own)])), None

    x, _ = scan_layers(
      self.layers, body, sharding.split_rows(embeds), (prefix.k, prefix.v), remat=remat
    )
    return self.norm(x)
