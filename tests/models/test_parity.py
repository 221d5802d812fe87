"""Every part against transformers, on a tiny random model that went through the converter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, JanusForConditionalGeneration

from dsr_jax import convert
from dsr_jax.models.janus.processor import ASSISTANT, BOI, USER
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text

TOLERANCE = 1e-4
PROMPTS = ['a red circle left of a blue square', 'no', 'two small green rings and 3 dotted stars.']


@pytest.fixture(scope='module')
def pixels():
  return np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


def to_torch(pixels):
  return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def close(ours, theirs):
  np.testing.assert_allclose(
    np.asarray(ours), theirs.detach().float().numpy(), atol=TOLERANCE, rtol=0
  )


def test_vision_tower(model, hf_model, pixels):
  want = hf_model.model.vision_model(to_torch(pixels)).last_hidden_state
  assert want.std() > 0.5
  close(jax.jit(model.vision_model)(jnp.asarray(pixels)), want)


def test_aligner(model, hf_model, pixels):
  want = hf_model.model.get_image_features(to_torch(pixels)).pooler_output
  assert want.std() > 0.2
  close(jax.jit(model.image_features)(jnp.asarray(pixels)), want)


def test_code_embeddings(model, hf_model):
  codes = np.arange(40).reshape(2, 20)
  close(
    jax.jit(model.code_embeddings)(jnp.asarray(codes)),
    hf_model.prepare_embeddings_for_image_generation(torch.from_numpy(codes)),
  )


def test_vq_decoder(model, hf_model):
  codes = np.random.default_rng(1).integers(0, 40, (4, 16))
  want = hf_model.decode_image_tokens(torch.from_numpy(codes))
  assert want.std() > 0.2
  close(jax.jit(model.vqmodel.decode)(jnp.asarray(codes)), want)


def test_vq_encoder(model, hf_model, pixels):
  want = hf_model.model.vqmodel.encode(to_torch(pixels)).image_tokens.reshape(3, -1)
  assert len(set(want.flatten().tolist())) > 10
  np.testing.assert_array_equal(jax.jit(model.vqmodel.encode)(jnp.asarray(pixels)), want)


def logp_of(logits, targets):
  """torch logits (T, V) and targets (T,) -> log-probabilities (T,)."""
  return torch.log_softmax(logits.double(), -1).gather(
    -1, torch.as_tensor(np.asarray(targets)).long()[:, None]
  )[:, 0]


def hidden_to_logits(hf_model, embeds, mask=None):
  """Raw states of the language model."""
  return hf_model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state


def test_text_logits_with_a_padding_row_that_is_not_zero(model, hf_model, bundle):
  t = bundle.config.templates
  ids = np.random.default_rng(2).integers(0, 330, (2, 12))
  ids[:, 5] = t.pad_id
  want = hf_model(input_ids=torch.from_numpy(ids)).logits
  assert (
    want.std() > 1
    and bundle.params['language_model']['embed_tokens']['embedding'][t.pad_id].std() > 0.5
  )
  close(text_logits(model, ids), want[:, 1:])


def text_logits(model, ids):
  """(R, T) -> (R, T, V): the first token as a shared prefix, the rest as its extension, as scoring
  runs them.
  """

  @jax.jit
  def run(ids):
    embeds = model.language_model.embed_tokens(ids)
    prefix = model.language_model.prefill(embeds[:, :1], jnp.ones(len(ids), jnp.int32))
    return model.lm_head(model.language_model.extend(prefix, embeds[:, None, 1:])[:, 0])

  return run(jnp.asarray(ids))


def hf_prompt_ids(bundle, text):
  """Ids of the whole generation prompt, tokenised by transformers from the string."""
  return bundle.processor.tokenizer(f'{USER}: {text}\n\n{ASSISTANT}:{BOI}', return_tensors='pt')[
    'input_ids'
  ]


def hf_image_logits(hf_model, ids, codes):
  """(1, P) prompt ids ending in begin-of-image and (N,) codes -> (N, K)."""
  codes = torch.as_tensor(np.asarray(codes)).long()[None]
  embeds = torch.cat(
    [
      hf_model.get_input_embeddings()(ids),
      hf_model.prepare_embeddings_for_image_generation(codes[:, :-1]),
    ],
    dim=1,
  )
  return hf_model.model.generation_head(hidden_to_logits(hf_model, embeds)[:, ids.shape[1] - 1 :])[
    0
  ]


def encoded(bundle, texts, encode='encode_prompt', length=None):
  text = bundle.processor.pad([getattr(bundle.processor, encode)(t) for t in texts], length)
  return Text(jnp.asarray(text.ids), jnp.asarray(text.mask))


@pytest.mark.parametrize('guidance', [1.0, 5.0])
def test_picture_log_probabilities(model, hf_model, bundle, guidance):
  """Teacher-forced through the protocol, mixed prompt lengths, against transformers one prompt at a
  time, unpadded.
  """
  t = bundle.config.templates
  codes = np.random.default_rng(3).integers(0, 40, (3, 2, 16))
  prompt = encoded(bundle, PROMPTS, length=24)
  prompt = Text(prompt.ids[:, None], prompt.mask[:, None])
  score = jax.jit(
    lambda codes: model.picture_logps(prompt, codes, None, Scoring(guidance=guidance)).logp
  )
  got = score(jnp.asarray(codes))
  for row, text in enumerate(PROMPTS):
    ids = hf_prompt_ids(bundle, text)
    blank = ids.clone()
    blank[:, 1:-1] = t.pad_id
    for candidate in range(2):
      logits = hf_image_logits(hf_model, ids, codes[row, candidate])
      assert logits.std() > 1
      uncond = hf_image_logits(hf_model, blank, codes[row, candidate])
      close(
        got[row, candidate], logp_of(uncond + guidance * (logits - uncond), codes[row, candidate])
      )


def test_text_log_probabilities_given_a_picture(model, hf_model, bundle, pixels):
  """Teacher-forced through the protocol against transformers' own processor and masked scatter,
  unpadded.
  """
  questions, answers = (
    ['Is there a red disc?', 'no', 'yes yes'],
    ['yes', 'a large striped diamond', 'no.'],
  )
  text = encoded(bundle, answers, 'encode_answer', 16)
  picture = Picture(jnp.zeros((3, 1, 16), jnp.int32), jnp.asarray(pixels)[:, None])
  question = encoded(bundle, questions, 'encode_question', 9)
  score = jax.jit(
    lambda ids: (
      model.text_logps(picture, question, Text(ids, text.mask[:, None]), None, Scoring()).logp
    )
  )
  got = score(text.ids[:, None])
  t = bundle.config.templates
  for row, (question, answer) in enumerate(zip(questions, answers)):
    content = bundle.processor.encode_answer(answer)
    ids = [
      *t.understanding_prefix,
      *[t.image_id] * 16,
      *t.understanding_infix,
      *bundle.processor.encode_question(question),
      *t.understanding_suffix,
      *content,
    ]
    logits = hf_model(
      input_ids=torch.tensor([ids]), pixel_values=to_torch(pixels[row : row + 1])
    ).logits[0]
    allowed = logits[-len(content) - 1 : -1].clone()
    allowed[:, list(t.forbidden_text_ids)] = -torch.inf  # the policy never writes special tokens
    close(got[row, 0, : len(content)], logp_of(allowed, content))
    assert not np.asarray(got[row, 0, len(content) :]).any()


def greedy_codes(model, bundle, texts, guidance, length=None):
  keys = jax.random.split(jax.random.key(0), (len(texts), 1))
  sample = jax.jit(
    lambda: model.sample_pictures(
      encoded(bundle, texts, length=length),
      keys,
      Sampling(temperature=0, guidance=guidance, segment=6),
    )
  )
  return np.asarray(sample()[0])[:, 0]


def hf_greedy_codes(hf_model, bundle, texts, guidance):
  """transformers' generate on left-padded prompts."""
  prompts = [f'{USER}: {text}\n\n{ASSISTANT}:{BOI}' for text in texts]
  batch = bundle.processor.tokenizer(prompts, return_tensors='pt', padding=True)
  t = bundle.config.templates
  hf_model.generation_config.update(
    bos_token_id=t.bos_id,
    eos_token_id=t.eos_id,
    pad_token_id=t.pad_id,
    generation_kwargs=dict(boi_token_id=t.boi_id),
  )
  return hf_model.generate(
    input_ids=batch['input_ids'],
    attention_mask=batch['attention_mask'],
    generation_mode='image',
    do_sample=False,
    guidance_scale=guidance,
  ).numpy()


def test_greedy_guided_codes(model, hf_model, bundle):
  want = hf_greedy_codes(hf_model, bundle, PROMPTS, 5.0)
  assert want.shape == (3, 16) and len({tuple(row) for row in want.tolist()}) == 3
  np.testing.assert_array_equal(greedy_codes(model, bundle, PROMPTS, 5.0, length=20), want)


def test_an_exported_directory_gives_transformers_the_same_model(
  tmp_path, bundle, hf_directory, hf_model
):
  target = tmp_path / 'exported'
  convert.save(target, bundle.config, jax.tree.map(jnp.asarray, bundle.params), hf_directory)
  again, info = JanusForConditionalGeneration.from_pretrained(
    target, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
  theirs, ours = hf_model.state_dict(), again.state_dict()
  assert theirs.keys() == ours.keys() and all(
    torch.equal(theirs[name], ours[name]) for name in theirs
  )
  ids = AutoTokenizer.from_pretrained(target)(PROMPTS[0], return_tensors='pt')['input_ids']
  assert torch.equal(again.eval()(input_ids=ids).logits, hf_model(input_ids=ids).logits)
  assert AutoProcessor.from_pretrained(target).num_image_tokens == 16
  assert again.generation_config.guidance_scale == 5
