"""Adapters against the plain calls of transformers, written out, on small random models."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest
import tiny_evaluators
import torch
import torch.nn.functional as F
import transformers

from dsr_jax.errors import InputError
from dsr_jax.evaluate import geneval, pictures, protocol
from dsr_jax.evaluate.adapters import (
  blip_vqa,
  clip,
  loading,
  mask2former,
  open_detector,
  self_test,
  tagger,
)
from dsr_jax.evaluate.t2i_compbench import binding, spatial

TOLERANCE = 1e-5


@pytest.fixture(scope='module', autouse=True)
def one_thread():
  torch.set_num_threads(1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('evaluators')


@pytest.fixture(scope='module')
def clip_directory(folder):
  return tiny_evaluators.clip(folder / 'clip')


@pytest.fixture(scope='module')
def picture():
  pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
  return Image.fromarray(pixels).resize((84, 60), Image.Resampling.BICUBIC)


# CLIP.


def test_clip_sees_what_the_processor_of_transformers_makes(picture):
  """Its own processor for sizes that leave an even rest to cut."""
  processor = transformers.CLIPImageProcessorPil(
    size={'shortest_edge': 30}, crop_size={'height': 30, 'width': 30}
  )
  wanted = processor(images=picture, return_tensors='pt')['pixel_values'][0]
  torch.testing.assert_close(clip.prepare(picture, 30), wanted, atol=TOLERANCE, rtol=0)


def test_cosines(clip_directory, picture):
  ours = clip.Clip(str(clip_directory), 'cpu')
  model = transformers.CLIPModel.from_pretrained(clip_directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(clip_directory)
  texts = ['a dog', 'red']
  images = [picture, picture.rotate(90)]
  pixels = torch.stack([clip.prepare(image, 32) for image in images])
  tokens = tokenizer(texts, padding=True, return_tensors='pt')
  with torch.no_grad():
    out = model(**tokens, pixel_values=pixels)
  wanted = (out.image_embeds * out.text_embeds).sum(-1).tolist()
  assert ours.cosines(images, texts) == pytest.approx(wanted, abs=TOLERANCE)
  assert ours.cosines([picture], ['a very long text ' * 9])[0]  # cut at the context, not an error
  assert ours.label(clip.SCORE_SHAPE) == protocol.Label.OTHER_MODEL
  assert ours.label(ours.shape) == protocol.Label.OFFICIAL
  assert len(ours.about.sha256) == 64 and ours.about.architecture == 'CLIPModel'


def test_colors_of_cut_out_objects(clip_directory, picture):
  ours = clip.Clip(str(clip_directory), 'cpu')
  model = transformers.CLIPModel.from_pretrained(clip_directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(clip_directory)
  mask = np.zeros((60, 84), bool)
  mask[10:40, 20:70] = True
  thing = geneval.Detection(np.array([20, 10, 70, 40], np.float32), np.float32(1), mask)
  # By hand: grey outside, cut, the mean of three normalized texts.
  pixels = np.array(picture)
  pixels[~mask] = 0x99
  alone = Image.fromarray(pixels[10:40, 20:70])
  np.testing.assert_array_equal(clip.cut_out(picture, thing), alone)
  rows = []
  with torch.no_grad():
    for color in geneval.COLORS:
      texts = [f'a photo of a {color} cup', f'a photo of a {color}-colored cup',
               f'a photo of a {color} object']  # fmt: skip
      tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors='pt')
      rows.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(0))
    classifier = F.normalize(torch.stack(rows), dim=-1)
    seen = model.get_image_features(pixel_values=clip.prepare(alone, 32)[None]).pooler_output
  colors = clip.ColorClassifier(ours)
  as_asked = pictures.Object(picture, thing, 'cup')
  torch.testing.assert_close(colors.classifier('cup'), classifier, atol=TOLERANCE, rtol=0)
  wanted = geneval.COLORS[int((seen @ classifier.T).argmax())]
  assert colors([as_asked, as_asked._replace(name='dog'), as_asked])[::2] == [wanted, wanted]
  assert colors([]) == []


# Mask2Former.


@pytest.fixture(scope='module')
def mask2former_directory(folder):
  return tiny_evaluators.mask2former(folder / 'mask2former')


def test_pictures_go_into_the_detector_as_mmdet_has_it():
  """800 / 1333, the ratio kept, padded with grey to multiples of 32."""
  white = Image.new('RGB', (400, 300), 'white')
  ready = mask2former.prepare(white)
  assert (ready.height, ready.width) == (800, 1067)
  assert ready.pixels.shape == (1, 3, 800, 1088)
  mean, std = np.array(mask2former.MEAN), np.array(mask2former.STD)
  np.testing.assert_allclose(ready.pixels[0, :, 799, 1066], (255 - mean) / std, rtol=1e-5)
  np.testing.assert_allclose(ready.pixels[0, :, 799, 1067], (128 - mean) / std, rtol=1e-5)
  wide = mask2former.prepare(Image.new('RGB', (1000, 100)))
  assert (wide.height, wide.width) == (133, 1333)
  assert mask2former.prepare(Image.new('RGB', (384, 384))).pixels.shape == (1, 3, 800, 800)


def test_boxes_masks_and_scores_of_the_detector(mask2former_directory, picture):
  names = ['person', 'cat', 'cup', 'dog', 'car']
  ours = mask2former.Mask2Former(str(mask2former_directory), 'cpu', names=names, sides=(96, 160))
  [found] = ours([picture])
  model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(mask2former_directory)
  ready = mask2former.prepare(picture, 96, 160)
  with torch.no_grad():
    out = model(pixel_values=ready.pixels)
  masks = F.interpolate(
    out.masks_queries_logits, ready.pixels.shape[-2:], mode='bilinear', align_corners=False
  )[..., : ready.height, : ready.width]
  masks = F.interpolate(masks, (60, 84), mode='bilinear', align_corners=False)[0].numpy()
  chances = out.class_queries_logits[0].softmax(-1).numpy()
  # Nine queries of five classes make 45 pairs, all below the limit of 100.
  wanted = {name: [] for name in names}
  for query in range(9):
    inside = masks[query] > 0
    sure = 1 / (1 + np.exp(-masks[query][inside]))
    rows, columns = np.nonzero(inside)
    box = [0, 0, 0, 0]
    if inside.any():
      box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    for place, name in enumerate(names):
      score = chances[query, place] * (sure.sum() / (inside.sum() + 1e-6))
      wanted[name].append((score, box, inside))
  assert sum(len(x) for x in found.values()) == 45
  assert any(inside.any() and not inside.all() for _, _, inside in wanted['cat'])
  for name in names:
    ordered = sorted(found[name], key=score_of, reverse=True)
    for detection, (score, box, inside) in zip(
      ordered, sorted(wanted[name], key=first_of, reverse=True)
    ):
      assert detection.score == pytest.approx(score, abs=TOLERANCE)
      assert detection.box.tolist() == box
      np.testing.assert_array_equal(detection.mask, inside)


def test_pictures_of_all_sizes_are_seen_as_if_alone(mask2former_directory, picture):
  """Those of one size together; a common size would need padding, which changes what is found."""
  names = ['person', 'cat', 'cup', 'dog', 'car']
  ours = mask2former.Mask2Former(str(mask2former_directory), 'cpu', names=names, sides=(96, 160))
  shown = [picture, picture.rotate(180), picture.crop((0, 0, 50, 60)), picture.rotate(7)]
  for one, found in zip(shown, ours([*shown, *shown])):
    [alone] = ours([one])
    assert found.keys() == alone.keys()
    for name in alone:
      for a, b in zip(found[name], alone[name], strict=True):
        assert a.score == pytest.approx(b.score, abs=TOLERANCE)
        assert a.box.tolist() == b.box.tolist()
        np.testing.assert_array_equal(a.mask, b.mask)


def score_of(detection):
  return detection.score


def first_of(row):
  return row[0]


def test_at_most_100_pairs_are_kept():
  ready = mask2former.prepare(Image.new('RGB', (32, 32)), 32, 64)
  logits = torch.randn(30, 81, generator=torch.Generator().manual_seed(0))
  found = mask2former.instances(logits, torch.ones(30, 8, 8), ready, (32, 32))
  best = logits.softmax(-1)[:, :-1].flatten().sort(descending=True).values[:100]
  sure = torch.sigmoid(torch.tensor(1.0))
  np.testing.assert_allclose([d.score for _, d in found], best * sure, rtol=1e-5)


def test_a_detector_of_other_classes_is_refused(mask2former_directory):
  with pytest.raises(InputError, match='has 5 classes instead of the 80'):
    mask2former.Mask2Former(str(mask2former_directory), 'cpu')


# BLIP.


@pytest.fixture(scope='module')
def blip_directory(folder):
  return tiny_evaluators.blip(folder / 'blip')


@pytest.mark.parametrize('size', [32, 40])
def test_yes_and_no_of_blip(blip_directory, picture, size):
  """The parts of the model called one after another, one question at a time."""
  ours = blip_vqa.BlipVqa(str(blip_directory), 'cpu', size=size)
  model = transformers.BlipForQuestionAnswering.from_pretrained(blip_directory).eval()
  processor = transformers.BlipImageProcessorPil(size={'height': size, 'width': size})
  pixels = processor(images=picture, return_tensors='pt')['pixel_values']
  torch.testing.assert_close(blip_vqa.prepare(picture, size), pixels[0], atol=TOLERANCE, rtol=0)
  ids = {'a dog?': [30523, 1037, 3899, 1029, 102], 'red?': [30523, 2417, 1029, 102]}

  def wanted(picture, question):
    pixels = processor(images=picture, return_tensors='pt')['pixel_values']
    with torch.no_grad():
      seen = model.vision_model(pixels, interpolate_pos_encoding=size != 32).last_hidden_state
      question = torch.tensor([ids[question]])
      asked = model.text_encoder(question, encoder_hidden_states=seen).last_hidden_state
      logits = model.text_decoder(torch.tensor([[30522]]), encoder_hidden_states=asked).logits
    return logits[0, 0].softmax(-1)[[2748, 2053]].tolist()

  # Of several pictures at once, one of which nothing is asked about.
  shown = [picture, picture.rotate(90), picture.rotate(180)]
  questions = [['a dog?', 'red?'], [], ['red?']]
  found = ours.chances(shown, questions)
  assert list(map(len, found)) == [2, 0, 1]
  for one, texts, chances in zip(shown, questions, found):
    for text, chance in zip(texts, chances):
      np.testing.assert_allclose(chance, wanted(one, text), rtol=TOLERANCE, atol=0)
  assert ours(shown, questions) == [
    [f'{yes / (yes + no):.4f}' for yes, no in chances] for chances in found
  ]
  assert ours([picture], [[]]) == [[]]
  assert ours.about.settings == {'size': size, 'interpolated': size != 32}


def test_a_question_begins_with_enc_and_has_at_most_35_tokens(blip_directory):
  ours = blip_vqa.BlipVqa(str(blip_directory), 'cpu')
  rows = ours.tokens(['a dog ' * 40, 'red?'])
  assert list(map(len, rows)) == [35, 4]
  assert [ids[0] for ids in rows] == [binding.ENCODER_START] * 2


# The detector of any words.


@pytest.fixture(scope='module')
def owlv2_directory(folder):
  return tiny_evaluators.owlv2(folder / 'owlv2')


def test_boxes_of_the_open_detector(owlv2_directory, picture):
  ours = open_detector.OpenDetector(str(owlv2_directory), 'cpu', threshold=0.0)
  # Beside a picture of another size with more labels, and one without.
  beside, none, found = ours(
    [picture.rotate(90, expand=True), picture, picture],
    [['cup', 'car', 'dog'], [], ['dog', 'cat', 'dog']],
  )
  assert len(beside) == 16 and none == []
  model = transformers.Owlv2ForObjectDetection.from_pretrained(owlv2_directory)
  processor = transformers.AutoProcessor.from_pretrained(owlv2_directory)
  inputs = processor(
    text=[['a photo of a dog', 'a photo of a cat']], images=picture, return_tensors='pt'
  )
  with torch.no_grad():
    out = model(**inputs)
  width, height = open_detector.rules_size(picture.size)
  [wanted] = processor.image_processor.post_process_object_detection(
    out, threshold=0.0, target_sizes=[(height, width)]
  )
  order = wanted['scores'].argsort(descending=True)
  assert len(found) == len(order) == 16
  for detection, i in zip(found, order.tolist()):
    assert detection.score == pytest.approx(float(wanted['scores'][i]), abs=TOLERANCE)
    assert detection.label == ['dog', 'cat'][int(wanted['labels'][i])]
    np.testing.assert_allclose(detection.box, wanted['boxes'][i], atol=1e-3)
  sure = open_detector.OpenDetector(str(owlv2_directory), 'cpu', threshold=1.0)
  assert sure([picture], [['x']]) == [[]]


def test_rules_are_in_pixels_of_a_short_side_of_479():
  assert open_detector.rules_size((384, 384)) == (479, 479)
  assert open_detector.rules_size((512, 512)) == (479, 479)
  assert open_detector.rules_size((800, 400)) == (480, 240)


# Loading.


def test_another_architecture_is_refused_in_a_sentence(clip_directory, blip_directory, tmp_path):
  for adapter, directory in ((clip.Clip, blip_directory), (blip_vqa.BlipVqa, clip_directory)):
    with pytest.raises(InputError, match=r' holds a \w+; name an evaluator that is a \w+$'):
      adapter(str(directory), 'cpu')
  with pytest.raises(InputError, match='evaluator .*here.* is neither a directory nor a Hub id'):
    clip.Clip(str(tmp_path / 'none' / 'here'), 'cpu')
  (tmp_path / 'config.json').write_text(json.dumps({'architectures': ['CLIPModel']}))
  with pytest.raises(InputError, match='has no .safetensors file'):
    clip.Clip(str(tmp_path), 'cpu')


def test_missing_weights_are_refused(clip_directory, tmp_path):
  config = transformers.CLIPConfig.from_pretrained(clip_directory)
  config.text_config.num_hidden_layers = 3
  for file in clip_directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  config.architectures = ['CLIPModel']
  config.save_pretrained(tmp_path)
  with pytest.raises(InputError, match='lacks the weights of'):
    loading.load(transformers.CLIPModel, str(tmp_path), 'cpu')


# The self-test.


def seen_at(score):
  def detector(shown):
    assert all(picture.mode == 'RGB' and min(picture.size) > 200 for picture in shown)
    box = np.array([0, 0, 9, 9], np.float32)
    found = {name: [geneval.Detection(box, np.float32(score))] for name in ('cat', 'dog')}
    return [found] * len(shown)

  return detector


def test_a_detector_that_finds_nothing_stops_the_scoring():
  assert set(self_test.photos().values()) <= set(geneval.object_names())
  sizes = [path.stat().st_size for path in pathlib.Path(self_test.DIRECTORY).iterdir()]
  assert sum(sizes) <= 300_000
  with pytest.raises(InputError, match='mine found no object above 0.3'):
    self_test.check(self_test.look(seen_at(0.29)), 'mine')
  warnings = self_test.check(self_test.look(seen_at(0.95)), 'mine')
  assert len(warnings) == 2 and 'cup' in warnings[1]  # the cat is seen


# spaCy, and a picture's record from all of them.


@pytest.fixture(scope='module')
def spacy_tagger():
  return tagger.SpacyTagger()


def test_the_tagger_reads_as_the_facts_say(spacy_tagger):
  parsed = spacy_tagger('a green bench and a red car')
  assert parsed.noun_chunks == ('a green bench', 'a red car')
  assert [t.text for t in parsed.tokens if t.pos == 'ADJ'] == ['green', 'red']
  pair = spatial.simple_pair(spacy_tagger('a dog on the left of a car').tokens)
  assert pair == ('dog', 'car')


def test_records_of_pictures(spacy_tagger, picture):
  """Of all categories at once, through evaluators that are tables."""
  asked = []

  def vqa(_, questions):
    return [['0.5000'] * len(of_picture) for of_picture in questions]

  def detector(_, labels):
    boxes = [(0, 0, 10, 10), (100, 0, 110, 10)]
    return [
      [spatial.Detection(label, box, 1.0) for label, box in zip(of_picture, boxes)]
      for of_picture in labels
    ]

  def cosine(_, texts):
    asked.extend(texts)
    return [0.25] * len(texts)

  by = pictures.CompBenchEvaluators(spacy_tagger, vqa, detector, cosine)
  wanted = {
    'color/samples/a green bench and a red car_000000.png': {'binding': '0.2500'},
    'spatial/samples/a dog on the left of a car_000003.png': {'spatial': 1.0},
    'non_spatial/samples/A man reads a red book_000001.png': {'clip': 0.25},
    'numeracy/samples/two dogs_000009.png': {'numeracy': 0.5},
    'complex/samples/The red book is next to the old car._000000.png': {
      'binding': '0.2500', 'spatial': 1.0, 'clip': 0.25
    },
  }  # fmt: skip
  records = pictures.measure_compbench([picture] * len(wanted), list(wanted), by)
  for record, (path, parts) in zip(records, wanted.items()):
    assert {name: record[name] for name in parts} == parts, path
    assert record.keys() - parts.keys() <= {'questions'}
  assert 'A man reads a red book' in asked
  assert 'The book is to the car .' in asked  # spaCy takes `next` for an adjective


def test_pictures_of_several_prompts_are_judged_as_if_alone(picture, tmp_path):
  """Colors are asked of all pictures at once, and each clause gets those of its own objects."""
  rows = [
    {'tag': 'color_attr', 'prompt': 'p', 'include': [
      {'class': 'cup', 'count': 1, 'color': 'red'}, {'class': 'cat', 'count': 2, 'color': 'blue'}]},
    {'tag': 'single_object', 'prompt': 'p', 'include': [{'class': 'cup', 'count': 1}]},
    {'tag': 'colors', 'prompt': 'p', 'include': [{'class': 'dog', 'count': 1, 'color': 'red'}]},
    {'tag': 'colors', 'prompt': 'p', 'include': [{'class': 'cat', 'count': 1, 'color': 'green'}]},
  ]  # fmt: skip
  boxes = {name: np.array([x, 0, x + 9, 9], np.float32) for x, name in enumerate(('cup', 'cat'))}
  found = {name: [geneval.Detection(box, np.float32(0.8))] * 2 for name, box in boxes.items()}
  asked = []

  def colors(objects):
    asked.append([thing.name for thing in objects])
    assert all(thing.detection.box[0] == boxes[thing.name][0] for thing in objects)
    return ['red', 'blue', 'blue', 'green'][: len(objects)]

  by = pictures.GenEvalEvaluators(lambda shown: [found] * len(shown), colors)
  paths = [f'{i}.png' for i in range(4)]
  records = pictures.judge_geneval([picture] * 4, paths, rows, by)
  assert asked == [['cup', 'cat', 'cat', 'cat']]  # no dog is found, and nobody asks for its color
  assert [record['correct'] for record in records] == [True, True, False, True]
  assert records[2]['reason'] == 'expected dog>=1, found 0'
  assert json.loads(records[0]['details'])['cat'][0][:4] == [1, 0, 10, 9]
  assert [record['filename'] for record in records] == paths
  (tmp_path / '0.png').write_bytes(b'no picture')
  with pytest.raises(InputError, match='0.png is not a readable image'):
    pictures.load(str(tmp_path), ['0.png'])
