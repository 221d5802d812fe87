"""data.prompts and data.images: sets by name, so many of each, and what is said of one that is not
prepared.
"""

import dataclasses
import hashlib
import io
import json
import os
import shlex
import types

import numpy as np
import picture_sets as sets
from PIL import Image
import pytest
import run_command

from dsr_jax import config as config_lib
from dsr_jax import config_loading
from dsr_jax.data import batches as batches_lib
from dsr_jax.data import folders, held_out, mixtures, order, prepared, t2i_compbench
from dsr_jax.errors import InputError
from dsr_jax.prepare import __main__ as command
from dsr_jax.prepare import job

SIZE = 16


class Words:
  """A tokenizer of one id a character."""

  templates = types.SimpleNamespace(pad_id=0)

  def encode_prompt(self, text):
    return [ord(c) for c in text]

  encode_question = encode_prompt


def shade(value):
  file = io.BytesIO()
  Image.new('RGB', (20, 20), (value, 0, 0)).save(file, 'PNG')
  return file.getvalue()


def shades(values):
  return {f'{value:03d}.png': shade(value) for value in values}


def pictures(images, tmp_path, seed=0, size=SIZE, **data):
  data = config_lib.Data(images=str(images), data_dir=str(tmp_path), seed=seed, **data)
  return mixtures.pictures(data, 0, size, 'crop', batches_lib.NAMED_PICTURES).everything


def prompts(named, seed=0):
  data = config_lib.Data(prompts=str(named), seed=seed)
  found = mixtures.prompts(data, 0, batches_lib.NAMED_PROMPTS).everything
  return [found[i] for i in range(len(found))], found


def values(found):
  return [int(found[i][8, 8, 0]) for i in range(len(found))]


@pytest.fixture
def three(tmp_path):
  """A folder of shades 0-9, coco of 10-29 and journeydb of 30-49, and where the sets lie."""
  sets.write_folder(tmp_path / 'own', shades(range(10)))
  coco = sets.write_zip(tmp_path / 'coco.zip', shades(range(10, 30)))
  sets.prepare(coco, tmp_path, 'coco')
  journeydb = sets.write_tar(tmp_path / '000.tgz', shades(range(30, 50)))
  sets.prepare(journeydb, tmp_path, 'journeydb')
  return tmp_path


# What is written.


@pytest.mark.parametrize(
  'text, found',
  [
    ('coco:2800+journeydb:2800', [('coco', 2800), ('journeydb', 2800)]),
    ('scenes', [('scenes', None)]),
    ('coco/2017:5+a.txt', [('coco/2017', 5), ('a.txt', None)]),
    ('a:b', [('a:b', None)]),
  ],
)
def test_mixtures_are_read_as_they_are_written(text, found):
  assert mixtures.parts(text, 'data.images') == found


def test_a_path_with_plus_and_colon_is_the_path_it_is(tmp_path):
  odd, other = tmp_path / 'a+b:3', tmp_path / 'c+d'
  odd.mkdir()
  other.mkdir()
  assert mixtures.parts(str(odd), 'data.images') == [(str(odd), None)]
  text = f'coco:1+{odd}:7+{other}+{odd}'
  assert mixtures.parts(text, 'data.images') == [
    ('coco', 1),
    (str(odd), 7),
    (str(other), None),
    (str(odd), None),
  ]


def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('PLACE', 'own')
  sets.write_folder(tmp_path / 'own', shades([3]))
  assert values(pictures('~/own:1+$HOME/$PLACE', tmp_path)) == [3, 3]


@pytest.mark.parametrize('text', ['coco:0', 'coco++scenes', '+coco', 'coco+', ' '])
def test_a_mixture_of_nothing_is_one_sentence(text):
  with pytest.raises(InputError, match='data.images is .*; write a name'):
    mixtures.parts(text, 'data.images')


# So many of each.


def test_a_mixture_has_so_many_of_each_and_of_the_others_all(three):
  found = values(pictures(f'coco:5+{three}/own+journeydb:7', three))
  assert len(set(found)) == 5 + 10 + 7
  assert sum(10 <= v < 30 for v in found) == 5 and sum(v < 10 for v in found) == 10
  assert values(pictures('coco', three)) == list(range(10, 30))


def test_which_ones_is_up_to_the_seed_of_the_data_alone(three):
  first = values(pictures('coco:8+journeydb:8', three))
  assert values(pictures('coco:8+journeydb:8', three)) == first
  assert values(pictures('coco:8', three)) == first[:8]
  others = [values(pictures('coco:8+journeydb:8', three, seed=s)) for s in (1, 2)]
  assert first not in others and others[0] != others[1]


def test_fewer_of_a_set_are_some_of_more(three):
  few, many = (set(order.choice(3, 20, n)) for n in (5, 11))
  assert few < many and len(many) == 11


def test_more_than_there_are_is_one_sentence(three):
  with pytest.raises(InputError, match='coco has 20 images, fewer than the 21 asked for; lower'):
    pictures('coco:21', three)


def test_another_choice_or_another_order_has_another_fingerprint(three):
  found = [
    pictures(text, three, seed).fingerprint()
    for text, seed in (
      ('coco:8', 0),
      ('coco:8', 1),
      ('coco:9', 0),
      ('coco', 0),
      ('journeydb', 0),
      ('coco+journeydb', 0),
      ('journeydb+coco', 0),
    )
  ]
  assert len(set(found)) == len(found)


def test_pictures_are_what_pillow_reads_of_the_source(three):
  found = pictures(f'coco:3+{three}/own:2', three)
  assert found.take(range(5)).shape == (5, SIZE, SIZE, 3)
  assert np.array_equal(found[0], np.broadcast_to(found[0][0, 0], (SIZE, SIZE, 3)))


def test_scenes_and_folders_mix(tmp_path):
  sets.write_folder(tmp_path / 'own', shades(range(3)))
  found = pictures(f'scenes:4+{tmp_path}/own', tmp_path, size=32)
  whole = pictures('scenes', tmp_path, size=32)
  chosen = order.choice(0, len(whole), 4)
  for i, index in enumerate(chosen):
    np.testing.assert_array_equal(found[i], whole[index])
  assert values(found)[4:] == [0, 1, 2]


def test_prompts_mix_and_say_where_each_stands(tmp_path):
  (tmp_path / 'mine.txt').write_text('a cat\n\na dog\n')
  texts, found = prompts(f't2i_compbench:5+{tmp_path}/mine.txt')
  assert texts[5:] == ['a cat', 'a dog'] and found.where(6) == 'line 3 of mine.txt'
  source = t2i_compbench.load()
  chosen = order.choice(0, len(source), 5)
  assert texts[:5] == [source[i] for i in chosen]
  assert [found.where(i) for i in range(5)] == [source.where(i) for i in chosen]
  assert prompts('t2i_compbench')[1].fingerprint() == source.fingerprint()


# What is prepared, and what is not.


def test_what_is_not_prepared_is_an_error_with_the_command_that_prepares_it(tmp_path):
  """The very command, run as it stands there, makes the set that was missing."""
  with pytest.raises(InputError) as e:
    pictures('coco:3+journeydb:2', tmp_path)
  said = str(e.value)
  assert said.startswith(f'there is no coco and no journeydb in {tmp_path}; prepare them with')
  commands = [part.partition(' and ')[0] for part in said.split('python -m ')[1:]]
  assert len(commands) == 2
  for text, dataset in zip(commands, ('coco', 'journeydb')):
    module, *flags = shlex.split(text.partition(', or name')[0])
    assert module == 'dsr_jax.prepare' and f'--dataset={dataset}' in flags
    given = dict(flag.removeprefix('--').split('=', 1) for flag in flags)
    given['source'] = sets.write_zip(tmp_path / f'{dataset}.zip', shades(range(5)))
    run_command.run(command, **given)
  assert len(pictures('coco:3+journeydb:2', tmp_path)) == 5


def test_a_folder_of_the_same_name_is_named_as_one_may_mean_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  sets.write_folder(tmp_path / 'coco', shades(range(3)))
  with pytest.raises(InputError, match=r'\(\./coco names the folder\)'):
    pictures('coco', tmp_path / 'sets')
  assert len(pictures('./coco', tmp_path / 'sets')) == 3


def test_a_preparation_that_was_stopped_is_told_with_its_own_source(tmp_path, monkeypatch):
  source = sets.write_zip(tmp_path / 'x.zip', shades(range(20)))
  monkeypatch.setattr(job._Job, '_finish', lambda self: None)
  sets.prepare(source, tmp_path, 'coco')
  with pytest.raises(InputError, match=f'--source={source} .*coco is partly prepared'):
    pictures('coco', tmp_path)


def test_an_own_set_is_read_by_its_name_and_by_its_folder(tmp_path):
  sets.prepare(sets.write_zip(tmp_path / 'x.zip', shades(range(4))), tmp_path, name='my_pictures')
  assert values(pictures('my_pictures', tmp_path)) == [0, 1, 2, 3]
  assert values(pictures(tmp_path / 'my_pictures' / '1.0.0', 'nowhere')) == [0, 1, 2, 3]


def test_what_tfds_prepared_as_array_record_is_read(tmp_path):
  content = {f'{i:012d}.jpg': sets.picture((40, 30)) for i in range(6)}
  sets.tfds_coco(tmp_path, content)
  for name in ('coco', 'coco/2017'):
    found = pictures(name, tmp_path)
    assert len(found) == 6 and len({p.tobytes() for p in found.take(range(6))}) == 6


def test_a_tfrecord_copy_is_refused_with_the_command_that_converts_it(tmp_path):
  folder = sets.tfds_coco(tmp_path, {'1.jpg': sets.picture()}, form='tfrecord')
  with pytest.raises(InputError) as e:
    pictures('coco/2017', tmp_path)
  assert f'tfds convert_format --dataset_version_dir={folder}' in str(e.value)
  assert '--out_file_format=array_record' in str(e.value)
  # Converted in its place, TFDS notes the further format.
  path = os.path.join(folder, prepared.INFO)
  with open(path, encoding='utf-8') as f:
    info = json.load(f)
  info['alternativeFileFormats'] = ['array_record']
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(info, f)
  assert len(pictures('coco/2017', tmp_path)) == 1


def test_pictures_that_tfds_did_not_look_at_are_looked_at_here(tmp_path):
  content = {f'{i}.jpg': sets.picture((40, 30)) for i in range(4)}
  content['bad.jpg'] = content['0.jpg'][:200]
  sets.tfds_coco(tmp_path, content)
  with pytest.raises(InputError, match=r'found 1 of 5 images of coco .*bad\.jpg'):
    pictures('coco', tmp_path)
  assert len(pictures('coco', tmp_path, bad_images='skip')) == 4


@pytest.mark.parametrize('damage', ['missing', 'short', 'info'])
def test_a_damaged_set_is_one_sentence(damage, three):
  shard = three / 'coco/1.0.0/coco-train.array_record-00001'
  if damage == 'missing':
    shard.unlink()
  elif damage == 'short':
    shard.write_bytes(shard.read_bytes()[:-1000])
  else:
    (three / 'coco/1.0.0' / prepared.INFO).write_text('{')
  with pytest.raises(InputError) as e:
    pictures('coco', three)
  assert '\n' not in str(e.value) and str(three) in str(e.value)
  if damage != 'info':
    assert len(pictures('coco:1', three, seed=seed_without(1))) == 1


def seed_without(shard):
  """A seed whose one picture of 20 lies in another shard of 8."""
  return next(s for s in range(99) if order.choice(s, 20, 1)[0] // 8 != shard)


def test_shards_that_are_needed_come_from_a_bucket_and_stay(three, monkeypatch, capsys):
  monkeypatch.setenv('DSR_JAX_CACHE', str(three / 'cache'))
  monkeypatch.setattr(prepared, 'is_remote', lambda path: str(path).startswith(str(three / 'coco')))
  seed = seed_without(1)
  found = pictures('coco:1', three, seed)
  assert values(found) == [10 + order.choice(seed, 20, 1)[0]]
  copied = [p.name for p in (three / 'cache' / 'data').rglob('*array_record*')]
  assert len(copied) == 1 and 'copying      4 files' in capsys.readouterr().err
  assert values(pictures('coco', three)) == list(range(10, 30))
  assert 'copying      2 files' in capsys.readouterr().err
  pictures('coco', three)
  assert 'copying' not in capsys.readouterr().err
  monkeypatch.setenv('DSR_JAX_CACHE', str(three / 'other'))
  usage = type('Usage', (), {'free': 1 << 20})
  monkeypatch.setattr(prepared.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(InputError, match='has 1 MiB free, but the shards of .* need 256 MiB'):
    pictures('coco', three)


def test_a_bucket_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
  def lacking(path):
    raise ImportError('Please install gcsfs')

  monkeypatch.setattr(prepared.epath, 'Path', lacking)
  for act in (
    lambda: pictures('coco', 'gs://bucket/folder'),
    lambda: sets.prepare(tmp_path, 'gs://bucket/folder'),
  ):
    with pytest.raises(InputError, match=r'gs://bucket/folder \(Please install gcsfs\)'):
      act()


# In a run.


def test_the_papers_configs_name_the_papers_data():
  for size in ('1b', '7b'):
    config = config_loading.load(f'janus_pro_{size}')
    assert config.data.images == 'coco:2800+journeydb:2800'
    assert config.data.prompts == 't2i_compbench'


def test_batches_hold_a_mixture_and_each_of_its_pictures_once_an_epoch(three):
  (three / 'p.txt').write_text('a\nb\nc\n')
  data = config_lib.Data(
    prompts=str(three / 'p.txt'), images='coco:3+journeydb:3', data_dir=str(three)
  )
  method = config_lib.Method(inputs_per_step=4, question='q?', instruction='i!')
  made = batches_lib.make(data, method, Words(), SIZE)
  red = [int(pixels[8, 8, 0]) for step in range(3) for pixels in made.at(step).understanding.pixels]
  assert sorted(red) == sorted(values(pictures('coco:3+journeydb:3', three)))
  assert made.sizes() == {'prompts': 3, 'pictures': 6}


def test_a_run_of_an_earlier_version_knows_its_folder_by_names(tmp_path):
  sets.write_folder(tmp_path / 'own', shades(range(3)))
  stored = pictures(tmp_path / 'own', tmp_path)
  names = folders.find(str(tmp_path / 'own')).names
  assert stored.earlier_fingerprint() != stored.fingerprint()
  text = f'3\n{chr(10).join(names)}'
  assert stored.earlier_fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_a_prepared_set_is_measured_on_those_that_were_not_chosen(three, tmp_path):
  data = config_lib.Data(images='coco:2', data_dir=str(tmp_path))
  apart = held_out.Apart(share=0.5, listed=2)
  table = batches_lib.NAMED_PICTURES
  found = mixtures.pictures(data, 0, SIZE, 'crop', table, apart=apart)
  plain = mixtures.pictures(data, 0, SIZE, 'crop', table)
  assert values(found.learned) == values(plain.learned) == values(found.everything)
  assert len(found.measured) == 2 and not set(values(found.measured)) & set(values(found.learned))
  assert found.held_out == [] and plain.measured is None
  whole = dataclasses.replace(data, images='coco')
  assert mixtures.pictures(whole, 0, SIZE, 'crop', table, apart=apart).measured is None
