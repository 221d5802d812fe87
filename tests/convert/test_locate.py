"""What a user may call a model."""

import dataclasses
import fnmatch
import os
import shutil

import huggingface_hub
import jax
import numpy as np
import original_layout
import pytest
import torch

from dsr_jax import config_loading, convert, families, train
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError
from dsr_jax.models.janus.family import JANUS


def touch(directory, *names):
  for name in names:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text('')


@pytest.mark.parametrize(
  'name, parts',
  [
    ('run', ('run', None, None)),
    ('run@20', ('run', 20, None)),
    ('run:generator', ('run', None, 'generator')),
    ('run@20:understander', ('run', 20, 'understander')),
    ('run@x', ('run@x', None, None)),
    ('run@20:x', ('run', 20, 'x')),
    ('odd@3', ('odd@3', None, None)),
    ('odd:generator', ('odd:generator', None, None)),
    ('owner/name', ('owner/name', None, None)),
    ('C:model', ('C:model', None, None)),
  ],
)
def test_a_name_is_split_into_workdir_step_and_role(tmp_path, monkeypatch, name, parts):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path, 'run/checkpoints/x', 'odd@3/x', 'odd:generator/x')
  assert model_source.split(name) == parts


@pytest.mark.parametrize(
  'name, found',
  [
    ('plain@3', 'has a step, but plain is not the workdir'),
    ('plain:generator', 'has a role, but plain is not the workdir'),
    ('plain@3:generator', 'has a .* but plain'),
  ],
)
def test_a_step_or_a_role_of_what_is_no_run_is_refused(tmp_path, monkeypatch, name, found):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path, 'plain/config.json')
  with pytest.raises(InputError, match=found):
    model_source.locate(name)


@pytest.mark.parametrize(
  'remote, asked',
  [
    (['config.json', 'model.safetensors', 'pytorch_model.bin'], 1),
    (['config.json', 'pytorch_model.bin'], 2),
  ],
)
def test_torchs_files_are_downloaded_only_where_there_are_no_others(
  tmp_path, monkeypatch, remote, asked
):
  calls = []

  def snapshot_download(name, allow_patterns):
    assert name == 'deepseek-ai/Janus-Pro-1B'
    calls.append(allow_patterns)
    touch(tmp_path, *(f for f in remote if any(fnmatch.fnmatch(f, p) for p in allow_patterns)))
    (tmp_path / 'config.json').write_text('{}')
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  assert model_source.directory_of('deepseek-ai/Janus-Pro-1B') == str(tmp_path)
  assert len(calls) == asked
  assert sorted(p.name for p in tmp_path.iterdir()) == (
    remote[:2] if asked == 1 else sorted(remote)
  )


def test_commands_take_either_layout(hf_directory, hf_model, tmp_path):
  original_layout.write(tmp_path / 'o', hf_directory, hf_model, dtype=torch.float32)
  one, other = model_source.resolve(str(hf_directory)), model_source.resolve(str(tmp_path / 'o'))
  jax.tree.map(np.testing.assert_array_equal, one.bundle.params, other.bundle.params)
  assert one.method.guidance == other.method.guidance == 5.0
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one.bundle.params))
  jax.tree.map(np.testing.assert_array_equal, one.bundle.params, convert.load(hf_directory).params)


# What was meant.


def test_a_snapshot_without_its_card_is_enough_where_there_is_no_network(
  hf_directory, tmp_path, monkeypatch, capsys
):
  kept = tmp_path / 'models--owner--name'
  snapshot = kept / 'snapshots' / ('a' * 40)
  shutil.copytree(hf_directory, snapshot)
  touch(kept, 'refs/x')
  (kept / 'refs' / 'main').write_text('a' * 40)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

  def missing(name, allow_patterns):
    raise OSError(f'cannot find the files of the snapshot that {"are asked for, " * 30}README.md')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', missing)
  assert model_source.directory_of('owner/name') == str(snapshot)
  assert str(snapshot) in capsys.readouterr().err
  (snapshot / 'model.safetensors').unlink()
  with pytest.raises(InputError, match=r'there is no directory owner/name') as e:
    model_source.directory_of('owner/name')
  reason = str(e.value).partition('(')[2].partition(')')[0]
  assert reason.endswith((' are ...', ' asked ...', ' for, ...')) and len(reason) <= 400


@pytest.mark.parametrize(
  'name, hint',
  [
    ('run/checkpoints/3', 'write {here}/run@3'),
    ('run/checkpoints/3/', 'write {here}/run@3'),
    ('run/checkpoints', 'write {here}/run'),
    ('models--a-b--C--d', 'write {x}/snapshots/0 or {x}/snapshots/1 or a-b/C--d'),
  ],
)
def test_a_folder_beside_the_one_that_was_meant_is_recognized(tmp_path, monkeypatch, name, hint):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path, 'run/checkpoints/3/x', *(f'models--a-b--C--d/snapshots/{i}/x' for i in '10'))
  with pytest.raises(InputError) as e:
    model_source.locate(name)
  assert str(e.value).endswith(hint.format(here=tmp_path, x='models--a-b--C--d'))


@pytest.mark.parametrize('name', ['model.safetensors', 'tokenizer.json', 'config.json'])
def test_a_pointer_of_git_lfs_is_named(hf_directory, tmp_path, name):
  shutil.copytree(hf_directory, tmp_path / 'copy')
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n'
  (tmp_path / 'copy' / name).write_text(pointer)
  with pytest.raises(InputError, match=rf'{name} is a Git LFS pointer.*git lfs pull'):
    convert.load(tmp_path / 'copy')


# The model that a run began with.


@pytest.fixture
def moved(hf_directory, tmp_path, monkeypatch):
  """A run that was made in another folder, with a model beside it: function of what the run says of
  that model besides its name.
  """
  shutil.copytree(hf_directory, tmp_path / 'there' / 'mine')
  touch(tmp_path, 'run/checkpoints/x', 'here/x')
  monkeypatch.chdir(tmp_path / 'here')

  def make(**more):
    method = {'seed': 3, 'template': 'plain'}
    about = {'method': method, 'model': {'name': 'mine', 'fingerprint': 'f', **more}}
    monkeypatch.setattr(model_source.checkpoints, 'load_trained', lambda *_: ({}, about, 7))
    return str(tmp_path / 'run')

  return make


def test_a_run_finds_the_model_it_began_with_from_any_folder(moved, tmp_path):
  there = str(tmp_path / 'there' / 'mine')
  assert model_source.locate(moved(directory=there)).directory == there
  # One that does not say where it was, or whose model was moved since.
  for run in (moved(), moved(directory=str(tmp_path / 'gone'))):
    with pytest.raises(InputError, match='the model mine that the run .* began with.*--base=DIR'):
      model_source.locate(run)
    assert model_source.locate(run, there).directory == there
  with pytest.raises(InputError, match='--base=x is only for .*mine is not one'):
    model_source.locate(there, 'x')


def test_a_model_says_where_it_lies(hf_directory, bundle, monkeypatch):
  monkeypatch.chdir(hf_directory.parent)
  loaded = convert.load(hf_directory.name, lambda leaf: leaf)
  assert families.model_of(loaded, 'mine').source == {
    'name': 'mine',
    'directory': str(hf_directory),
    'fingerprint': bundle.source['hash'],
  }


# How a model is sampled from, and reads.


def test_settings_are_the_runs_or_those_of_janus(hf_directory, moved):
  plain = model_source.method_of(model_source.locate(str(hf_directory)))
  assert (plain.crop, plain.guidance, plain.temperature, plain.cfg_interval) == ('pad', 5.0, 1.0, 0)
  run = model_source.method_of(model_source.locate(moved(directory=str(hf_directory))))
  assert (run.crop, run.seed, run.template) == ('crop', 3, 'plain')


@pytest.mark.parametrize('found', [-5, '"5"', 'true', '1e999', 'NaN', '[5]', 10**400])
def test_a_guidance_that_is_none_is_refused(hf_directory, tmp_path, found):
  shutil.copytree(hf_directory, tmp_path / 'copy')
  (tmp_path / 'copy' / 'generation_config.json').write_text(f'{{"guidance_scale": {found}}}')
  with pytest.raises(InputError, match='guidance_scale in .*; change it to .* from 0 to 1000'):
    model_source.method_of(model_source.locate(str(tmp_path / 'copy')))


def test_the_template_is_the_one_asked_for_or_the_runs_or_the_models_own(hf_directory, tmp_path):
  name = str(hf_directory)
  own, plain = model_source.resolve(name), model_source.resolve(name, template='plain')
  assert (own.method.template, plain.method.template) == ('tokens', 'plain')
  frame = plain.bundle.processor.templates
  assert plain.bundle.config.templates == frame != own.bundle.config.templates
  model = families.model_of(plain.bundle, name)
  assert model.template == 'plain'
  assert model.graphdef == JANUS.graphdef(plain.bundle.config)
  with pytest.raises(
    InputError, match='method.template=demo is not a template of the family Janus'
  ):
    model_source.resolve(name, template='demo')


def test_settings_of_another_model_are_said(hf_directory, capsys):
  config = config_loading.load('scenes')
  located = model_source.locate(str(hf_directory))
  model_source.note_other_settings(config, located)
  said = capsys.readouterr().err
  assert 'the settings of scenes are used for' in said and 'guidance 2.0 (its own: 5.0)' in said
  own = dataclasses.replace(config, model=os.path.relpath(hf_directory))
  model_source.note_other_settings(own, located)
  scenes = model_source.locate(model_source.EMBEDDED)
  model_source.note_other_settings(config, scenes)
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  'key, limit', [('question', 'method.max_text_tokens'), ('instruction', 'data.max_prompt_tokens')]
)
def test_texts_for_which_a_model_has_no_room_are_refused_before_a_run(bundle, key, limit):
  model = families.model_of(bundle, 'mine')
  room = JANUS.room(model.config)
  assert 0 < room < model.config.text.max_position_embeddings - model.config.num_codes
  train.check_room(model, config_loading.load('scenes'))
  asked = config_loading.load('scenes', **{f'method__{key}': 'red disc ' * 1500})
  words = rf'method.{key} has \d+ tokens and {limit} is 48, but .* room for only {room} together'
  with pytest.raises(InputError, match=words):
    train.check_room(model, asked)
  task = {'question': 'generation', 'instruction': 'understanding'}[key]  # where it is not asked
  method = dataclasses.replace(asked.method, task=task)
  train.check_room(model, dataclasses.replace(asked, method=method))
