"""Rewards: how good each candidate of a group is, on the device, never differentiated.

The dual self-rewards (arXiv 2506.07963, eq. 3) ask how likely the original input is, given a
sampled output: means over tokens of plain conditional log-probabilities in nats (no guidance,
temperature 1). The others are variants, external rewards and controls. A new one is a function of a
`Case` and a line of `REWARDS`.

Axes: B inputs, G candidates, T text tokens, N image codes, H W pixels, M hard negatives.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.convert import clip as clip_files
from dsr_jax.errors import InputError
from dsr_jax.losses import mean_logp
from dsr_jax.models import clip as clip_lib
from dsr_jax.models.unified import Picture, Scoring, Text, UnifiedModel, without_eos


class Case(NamedTuple):
  """Candidates of a chunk of inputs, and whatever may judge them.

  task: 'generation' or 'understanding'.
  model: the scorer.
  text: generation: the prompts (B, Tp); understanding: the sampled texts (B, G, T), with their
    end-of-text token.
  picture: generation: the drawn pictures (B, G, ...); understanding: the original ones (B, ...).
  question: what a text answers. generation: the instruction before the prompt in R_G (Ti,);
    understanding: the questions (B, Tq).
  keys: (B, G), of the candidates.
  extra: the fields of the batch that the reward declares: (B, ...) its own of each input, or whole
    ones.
  weights: what the reward's `load` returned.
  how, eos_id, method: `Scoring` of plain likelihoods, the end-of-text id, `config.Method`.
  """

  task: str
  model: UnifiedModel
  text: Text
  picture: Picture
  question: Text
  keys: Any
  extra: dict
  weights: Any
  how: Scoring
  eos_id: int
  method: Any


class Reward(NamedTuple):
  """A line of the table.

  function: Case -> rewards (B, G) float32; the higher the better.
  fields: names in `data.fields.FIELDS`, what it needs of each batch beyond prompts and pictures.
  tasks: those that it can reward.
  load: config.Method -> weights of its own, a pytree of arrays; None has none.
  self_reward: whether it depends on the scorer, so that live and frozen scorers may differ.
  """

  function: Callable
  fields: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ('generation', 'understanding')
  load: Callable | None = None
  self_reward: bool = True


def score(case: Case):
  """The configured reward of each candidate, (B, G) float32. An empty text has the worst of its
  group.
  """
  rewards = REWARDS[case.method.reward].function(case).astype(jnp.float32)
  if case.task == 'understanding':
    rewards = worst_where_empty(rewards, case.text, case.eos_id)
  return jax.lax.stop_gradient(rewards)


# The dual rewards, as functions of a model.


def generation(
  model: UnifiedModel,
  pictures: Picture,
  prompt: Text,
  instruction: Text,
  how: Scoring,
  *,
  eos_id: int | None = None,
  keys=None,
):
  """R_G: mean log-probability of the prompt's tokens, read off each sampled picture.

  Args:
    pictures: (B, G, ...), as the VQ decoder draws the sampled codes.
    prompt: (B, Tp), the original prompt's content.
    instruction: (Ti,), what the model is asked about the picture.
    eos_id: counts the end-of-text token too, if given.

  Returns:
    Rewards (B, G) and per-token log-probabilities (B, G, Tp or Tp + 1), float32.
  """
  logp, mask = text_given_picture(
    model, pictures, prompt, instruction, how, eos_id=eos_id, keys=keys
  )
  return jax.lax.stop_gradient((mean_logp(logp, mask), logp))


def understanding(model: UnifiedModel, codes, texts: Text, how: Scoring, *, eos_id: int, keys=None):
  """R_U: mean log-probability of the original picture's codes, drawn from each sampled text.

  Args:
    codes: (B, N), the original picture's.
    texts: (B, G, T), sampled; their end-of-text token is no part of the prompt.

  Returns:
    Rewards (B, G), where an empty text has the worst of its group, and per-token log-probabilities
    (B, G, N), float32.
  """
  scores = model.picture_logps(texts, codes[:, None], keys, how)
  rewards = worst_where_empty(jnp.mean(scores.logp, axis=-1), texts, eos_id)
  return jax.lax.stop_gradient((rewards, scores.logp))


def text_given_picture(
  model, pictures: Picture, prompt: Text, instruction: Text, how: Scoring, *, eos_id=None, keys=None
):
  """Log-probabilities (B, G, T) of one prompt an input, (B, T), off each picture (B, G, ...), and
  their mask (B, 1, T).
  """
  if eos_id is not None:
    prompt = with_eos(prompt, eos_id)
  answer = Text(prompt.ids[:, None], prompt.mask[:, None])
  return model.text_logps(
    pictures, _for_rows(instruction, prompt.ids.shape[0]), answer, keys, how
  ).logp, answer.mask


def worst_where_empty(rewards, texts: Text, eos_id: int):
  """Rewards (B, G) with the worst of the group in the place of a text without content."""
  empty = ~jnp.any(texts.mask & (texts.ids != eos_id), axis=-1)
  worst = jnp.min(jnp.where(empty, jnp.inf, rewards), axis=-1, keepdims=True)
  return jnp.where(empty & jnp.isfinite(worst), worst, rewards)


def with_eos(text: Text, eos_id: int) -> Text:
  """Appends the end-of-text token to left-justified content: (..., T) -> (..., T + 1)."""
  room = [(0, 0)] * (text.ids.ndim - 1) + [(0, 1)]
  ids, mask = jnp.pad(text.ids, room), jnp.pad(text.mask, room)
  end = jnp.arange(ids.shape[-1]) == jnp.sum(mask, axis=-1, keepdims=True)
  return Text(jnp.where(end, eos_id, ids), mask | end)


def without_picture(pixels) -> Picture:
  """Pixels (B, ..., H, W, 3) -> one grey picture an input, (B, 1, H, W, 3), in whose place a text
  is guessed and not read.
  """
  return Picture(None, jnp.zeros((pixels.shape[0], 1, *pixels.shape[-3:]), pixels.dtype))


UNPROMPTED = 0.0  # guidance weight 0 leaves the unconditional branch alone


def reversed_logps(case: Case):
  """Per-token log-probabilities (B, G, T or N) of the original input given each candidate, and
  their mask.
  """
  if case.task == 'generation':
    return text_given_picture(
      case.model,
      case.picture,
      case.text,
      case.question,
      case.how,
      eos_id=_counted_eos(case),
      keys=case.keys,
    )
  return _codes_given_text(case, case.text, case.picture.codes[:, None])


def _counted_eos(case: Case):
  return case.eos_id if case.method.eos_in_reward else None


def _codes_given_text(case: Case, text: Text, codes, how: Scoring | None = None):
  logp = case.model.picture_logps(text, codes, case.keys, how or case.how).logp
  return logp, jnp.ones(logp.shape, bool)


def _for_rows(text: Text, rows: int) -> Text:
  """(T,) -> (rows, T)."""
  return Text(*(jnp.broadcast_to(x, (rows, *x.shape)) for x in text))


# The table's functions.


def dual(case: Case):
  """R_G and R_U, eq. 3."""
  return mean_logp(*reversed_logps(case))


def probability(case: Case):
  """The mean probability of the original input's tokens: one hopeless token costs little."""
  logp, mask = reversed_logps(case)
  return mean_logp(jnp.exp(logp), mask)


def pmi(case: Case):
  """R_G and R_U with tokens weighed by how much the candidates say about them.

  The weight of token t is the group's mean of |log p(x_t | y) - log p(x_t | nothing)|, the weights
  of a sequence summing to 1. Nothing is a grey picture, or the unconditional prompt of guidance.
  """
  logp, mask = reversed_logps(case)
  if case.task == 'generation':
    alone, _ = text_given_picture(
      case.model,
      without_picture(case.picture.pixels),
      case.text,
      case.question,
      case.how,
      eos_id=_counted_eos(case),
      keys=case.keys[:, :1],
    )
  else:
    one = Text(case.text.ids[:, :1], case.text.mask[:, :1])
    alone, _ = _codes_given_text(
      case._replace(keys=case.keys[:, :1]),
      one,
      case.picture.codes[:, None],
      dataclasses.replace(case.how, guidance=UNPROMPTED),
    )
  weight = jnp.mean(jnp.where(mask, jnp.abs(logp - alone), 0.0), axis=1, keepdims=True) + 1e-6
  return jnp.sum(jnp.where(mask, weight * logp, 0.0), axis=-1) / jnp.sum(
    jnp.where(mask, weight, 0.0), axis=-1
  )


def contrastive(case: Case):
  """log of the original input's share among itself and M hard negatives, by their whole likelihoods
  given the candidate.

  Negatives of a prompt: words of one kind (colours, counts, sides ...) changed places or were
    replaced. Of a picture: other pictures.
  """
  logp, mask = reversed_logps(case)
  totals = [jnp.sum(jnp.where(mask, logp, 0.0), axis=-1)]
  if case.task == 'generation':
    for m in range(case.extra['negative_ids'].shape[1]):
      other = Text(case.extra['negative_ids'][:, m], case.extra['negative_mask'][:, m])
      logp, mask = text_given_picture(
        case.model,
        case.picture,
        other,
        case.question,
        case.how,
        eos_id=_counted_eos(case),
        keys=case.keys,
      )
      totals.append(jnp.sum(jnp.where(mask, logp, 0.0), axis=-1))
  else:
    for m in range(case.extra['negative_pixels'].shape[1]):
      totals.append(
        jnp.sum(
          _codes_given_text(
            case, case.text, _codes(case, case.extra['negative_pixels'][:, m])[:, None]
          )[0],
          axis=-1,
        )
      )
  return totals[0] - jax.nn.logsumexp(jnp.stack(totals), axis=0)


def vqa(case: Case):
  """Self-VQA: the probability of yes against no when the model is asked whether the picture shows
  the text.
  """
  inputs, group = case.keys.shape

  def flat(x):
    return jnp.broadcast_to(x, (inputs, group, *x.shape[2:])).reshape(
      -1, *x.shape[2:]
    )  # a pair is a row

  if case.task == 'generation':
    picture, text = case.picture, Text(case.text.ids[:, None], case.text.mask[:, None])
  else:
    picture, text = (
      Picture(*(x[:, None] for x in case.picture)),
      without_eos(case.text, case.eos_id),
    )
  question = spliced(case.extra['yes_before'], Text(*map(flat, text)), case.extra['yes_after'])
  answers = _stacked(case.extra['answer_yes'], case.extra['answer_no'])
  answers = Text(*(jnp.broadcast_to(x, (inputs * group, *x.shape)) for x in answers))
  keys = jnp.broadcast_to(case.keys.reshape(-1, 1), (inputs * group, 2))
  logp = case.model.text_logps(
    Picture(*(flat(x)[:, None] for x in picture)), question, answers, keys, case.how
  ).logp
  total = jnp.sum(jnp.where(answers.mask, logp, 0.0), axis=-1).reshape(inputs, group, 2)
  return jax.nn.sigmoid(total[..., 0] - total[..., 1])


def _stacked(*rows) -> Text:
  """Ids of several lengths, (T,) each -> one Text of that many rows."""
  longest = max(map(len, rows))
  return Text(
    jnp.stack([jnp.pad(x, (0, longest - len(x))) for x in rows]),
    jnp.stack([jnp.arange(longest) < len(x) for x in rows]),
  )


def spliced(before, content: Text, after) -> Text:
  """Ids before and after left-justified content (R, T), as one left-justified text (R, T + ...)."""
  rows, room = content.ids.shape
  length = jnp.sum(content.mask, axis=-1, keepdims=True)
  order = jnp.argsort(
    ~content.mask, axis=-1, stable=True
  )  # ids dropped in the middle leave no hole
  ids = jnp.take_along_axis(content.ids, order, axis=-1)
  place = jnp.arange(len(before) + room + len(after))[None]
  head = jnp.concatenate(
    [jnp.broadcast_to(before, (rows, len(before))), ids, jnp.zeros((rows, len(after)), ids.dtype)],
    axis=1,
  )
  tail_place = place - len(before) - length
  tail = jnp.asarray(after)[jnp.clip(tail_place, 0, len(after) - 1)]
  return Text(jnp.where(tail_place < 0, head, tail), tail_place < len(after))


def clip(case: Case):
  """Cosine similarity of picture and prompt by a CLIP (the paper's A.4)."""
  config = clip_files.read_config(case.method.clip_model)
  return clip_lib.similarity(config, case.weights, case.picture.pixels, case.extra['clip_ids'])


def _load_clip(method):
  return clip_files.load(method.clip_model)


# Controls: what a gain must be compared with.


def random(case: Case):
  """A number in [0, 1) by the candidate's key."""

  def draw(key):
    return jax.random.uniform(
      jax.random.fold_in(key, 2**31 - 1)
    )  # sampling folds in the token's index

  return jax.vmap(jax.vmap(draw))(case.keys)


def forward(case: Case):
  """How likely the candidate itself is, given its input: whether the reward is only the model's
  confidence. Mean over its tokens.
  """
  if case.task == 'generation':
    prompt = Text(case.text.ids[:, None], case.text.mask[:, None])
    return mean_logp(*_codes_given_text(case, prompt, case.picture.codes))
  picture = Picture(*(x[:, None] for x in case.picture))
  return mean_logp(
    case.model.text_logps(picture, case.question, case.text, case.keys, case.how).logp,
    case.text.mask,
  )


def shuffled(case: Case):
  """R_G and R_U of another input than the one that was asked for: whether what is rewarded is only
  how a candidate looks.
  """
  if case.task == 'generation':
    case = case._replace(text=Text(case.extra['other_ids'], case.extra['other_mask']))
  else:
    case = case._replace(picture=Picture(_codes(case, case.extra['other_pixels']), None))
  return dual(case)


def judge(case: Case):
  """The exact judge of Scenes: the share of a prompt's atoms that are drawn, or F1 of a text's
  atoms.

  The one exception to the rule that nothing leaves the device inside a step: the judge is NumPy
  code on the host. It is a control only. With `method.judge_accuracy` below 1, so many verdicts v
  are right, and the others are turned around to 1 - v, by the candidate's key.
  """
  from dsr_jax.rewards import scenes_judge as callback
  from dsr_jax.scenes import world

  inputs, group = case.keys.shape
  side = case.picture.pixels.shape[-2]
  if side != world.IMAGE_SIZE:
    raise InputError(
      f'found a model of {side} x {side} pixels and method.reward=judge, which reads pictures of '
      'Scenes; expected '
      f'{world.IMAGE_SIZE} x {world.IMAGE_SIZE}; choose another reward'
    )
  pixels = jnp.clip((case.picture.pixels * 0.5 + 0.5) * 255.0, 0, 255).astype(jnp.uint8)
  text = case.text if case.task == 'generation' else without_eos(case.text, case.eos_id)
  host = callback.verdicts_on_pictures if case.task == 'generation' else callback.verdicts_on_texts
  verdict = jax.pure_callback(
    host,
    jax.ShapeDtypeStruct((inputs, group), jnp.float32),
    pixels,
    text.ids,
    text.mask,
    case.extra['token_bytes'],
    case.extra['token_ends'],
    vmap_method='sequential',
  )
  wrong = random(case) >= case.method.judge_accuracy
  return jnp.where(wrong, 1.0 - verdict, verdict)


def _codes(case: Case, pixels):
  """uint8 pixels (B, H, W, 3) -> their codes (B, N)."""
  return case.model.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0).codes


REWARDS = {
  'dual': Reward(dual),
  'probability': Reward(probability),
  'pmi': Reward(pmi),
  'contrastive': Reward(contrastive, fields=('negatives',)),
  'vqa': Reward(vqa, fields=('yes_question',)),
  'clip': Reward(clip, fields=('clip',), tasks=('generation',), load=_load_clip, self_reward=False),
  'random': Reward(random, self_reward=False),
  'forward': Reward(forward),
  'shuffled': Reward(shuffled, fields=('others',)),
  'judge': Reward(judge, fields=('vocabulary',), self_reward=False),
}
