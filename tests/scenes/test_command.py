"""The command of Scenes and its TFDS builder."""

import json
import subprocess
import sys
import types

import numpy as np
from PIL import Image
import pytest

from dsr_jax.data import scenes_tfds as builder
from dsr_jax.errors import InputError
from dsr_jax.scenes import __main__ as command
from dsr_jax.scenes import grammar, judge, render, sets, world

SCENE = world.Scene((world.Thing(2, 0, 0, 8, 3, 0), world.Thing(0, 4, 1, 12, 2, 5)))


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'dsr_jax.scenes', *flags], capture_output=True, text=True
  )


def test_show_writes_a_sheet_and_says_how_well_patches_are_covered(tmp_path):
  done = run('--show=5', f'--output={tmp_path}/new/sheet.png')
  assert done.returncode == 0 and done.stdout == '' and '512 commonest' in done.stderr
  sheet = Image.open(tmp_path / 'new' / 'sheet.png')
  assert sheet.width == 4 * (192 + 8) + 8
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['sheet.png']
  first = np.asarray(sheet)[
    8 + 3 : 8 + 192 : 6, 8 + 3 : 8 + 192 : 6
  ]  # one screen pixel of each picture pixel
  np.testing.assert_array_equal(first, sets.pretraining_example(0, 0)[0])


def test_judge_prints_its_verdict_as_json(tmp_path):
  file = tmp_path / 'scene.png'
  Image.fromarray(render.render(SCENE)).resize((128, 128), Image.Resampling.NEAREST).save(file)
  done = run(f'--judge={file}', '--prompt=a photo of a red disc')
  assert done.returncode == 0
  verdict = json.loads(done.stdout)
  assert verdict['right'] and not verdict['strict'] and verdict['graded'] == 1
  assert [t['name'] for t in verdict['things']] == [
    'large striped blue square',
    'small plain red disc',
  ]


def test_judge_understands_relations_and_counts(tmp_path):
  file = str(tmp_path / 'scene.png')
  Image.fromarray(render.render(SCENE)).save(file)

  def verdict(text):
    return command.judge_file(file, text)

  assert verdict('a red disc left of a large striped blue square')['strict']
  assert not verdict('a red disc right of a blue square')['right']
  assert not verdict('two discs')['right'] and verdict('one disc')['right_and_counted']


def test_bad_input_is_one_sentence_on_stderr_and_status_two():
  done = run('--judge=missing.png', '--prompt=a disc')
  assert done.returncode == 2 and done.stdout == ''
  assert [
    line for line in done.stderr.splitlines() if line.startswith('error: ')
  ] == done.stderr.splitlines()
  assert 'missing.png' in done.stderr


@pytest.mark.parametrize(
  'given, message',
  [
    ({}, 'there is nothing to do; add --show=16'),
    ({'show': 0, 'output': 'x.png'}, '--show is 0; set it to a number from 1 to 1024'),
    ({'show': 4}, '--output is missing; add --output='),
    ({'judge': 'missing.png'}, '--prompt is missing; add --prompt='),
    ({'entropy': 0}, '--entropy is 0; set it to a number from 1'),
  ],
)
def test_bad_flags_are_refused_before_any_work(given, message):
  unset = {'show': None, 'output': None, 'judge': None, 'prompt': None, 'entropy': None, 'seed': 0}
  with pytest.raises(InputError, match=message):
    command.main(['scenes'], types.SimpleNamespace(**{**unset, **given}))


def test_pictures_and_prompts_of_other_worlds_are_refused(tmp_path):
  file = str(tmp_path / 'wide.png')
  Image.new('RGB', (40, 32)).save(file)
  with pytest.raises(InputError, match='wide.png has 40 x 32 pixels; use an image .* of 32 x 32'):
    command.read_picture(file)
  with pytest.raises(InputError, match="the prompt 'a dog' is not in the grammar"):
    command.judge_file(file, 'a dog')


def test_sheets_do_not_overwrite_folders_or_leave_halves(tmp_path):
  with pytest.raises(InputError, match='is the folder .*, but it must name a file'):
    command.show(1, str(tmp_path))
  (tmp_path / 'file').write_text('x')
  with pytest.raises(InputError, match='cannot write'):
    command.show(1, str(tmp_path / 'file' / 'sheet.png'))
  assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """Splits of tiny data sets: {(kind, split): data source}."""
  folder = tmp_path_factory.mktemp('tfds')
  sources = {}
  for kind in ('pictures', 'captions', 'prompts'):
    sizes = builder.Sizes(name=f'tiny_{kind}', kind=kind, pretraining=9, training=13, held_out=12)
    made = builder.Scenes(config=sizes, data_dir=folder, file_format='array_record')
    made.download_and_prepare()
    sources |= {(kind, split): made.as_data_source(split=split) for split in made.info.splits}
  return sources


def test_builder_writes_what_the_functions_draw(built):
  assert {key: len(source) for key, source in built.items()} == {
    ('captions', 'pretraining'): 9,
    ('pictures', 'training'): 13,
    ('pictures', 'validation'): 12,
    ('pictures', 'evaluation'): 12,
    ('prompts', 'training'): 13,
    ('prompts', 'validation'): 12,
    ('prompts', 'evaluation'): 12,
  }
  for i in range(9):
    pixels, caption = sets.pretraining_example(0, i)
    np.testing.assert_array_equal(built['captions', 'pretraining'][i]['image'], pixels)
    assert built['captions', 'pretraining'][i]['caption'].decode() == caption
  for i, scene in enumerate(sets.evaluation_scenes(12)):
    example = built['pictures', 'evaluation'][i]
    np.testing.assert_array_equal(example['image'], render.render(scene))
    assert judge.count_atoms(example['caption'].decode(), scene).right > 0
    assert json.loads(example['scene']) == [list(t) for t in scene.things]
  for i in range(13):
    assert built['prompts', 'training'][i]['prompt'].decode() == sets.training_prompt(0, i).text
    assert built['pictures', 'training'][i]['caption'] == b''
  categories = [e['category'].decode() for e in built['prompts', 'evaluation']]
  assert categories == [c for c in grammar.GENEVAL for _ in range(2)]


def test_building_needs_no_tensorflow(built):
  assert built and 'tensorflow' not in sys.modules
