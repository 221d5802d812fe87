"""A run's folder that has suffered, read for a replay: one sentence, or what is left of it."""

import json

import fake_run
import pytest

from dsr_jax import saved_config
from dsr_jax.errors import InputError
from dsr_jax.replay import past_step


@pytest.fixture
def workdir(tmp_path):
  content = {'config': saved_config.to_json(fake_run.config(3))}
  (tmp_path / 'config.json').write_text(json.dumps(content))
  lines = [json.dumps({'step': step, 'loss': 1.0}) for step in (1, 2, 3)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  return tmp_path


def test_a_whole_run_is_read(workdir):
  config, lines = past_step.read_run(str(workdir))
  assert config == fake_run.config(3) and sorted(lines) == [1, 2, 3]


def test_a_run_with_relative_paths_is_read_from_any_folder(workdir, tmp_path, monkeypatch):
  there, here = tmp_path / 'there', tmp_path / 'here'
  for name in ('prompts.txt', 'scenes'):
    (there / name).mkdir(parents=True)
  here.mkdir()
  monkeypatch.chdir(here)
  content = json.loads((workdir / 'config.json').read_text())
  content['config']['data'] |= {'prompts': 'prompts.txt', 'images': 'scenes'}
  for folder, found in ((None, 'prompts.txt'), (str(there), str(there / 'prompts.txt'))):
    (workdir / 'config.json').write_text(json.dumps({**content, 'folder': folder}))
    config, _ = past_step.read_run(str(workdir))
    assert (config.data.prompts, config.data.images) == (found, 'scenes')
  (here / 'prompts.txt').write_text('what lies here goes first')
  assert past_step.read_run(str(workdir))[0].data.prompts == 'prompts.txt'


@pytest.mark.parametrize(
  'devices, divided',
  [('2 x cpu', 2), ('8 x cpu', 8), ('4 x NVIDIA H100', 0), ('0 x cpu', 0), (7, 0), (None, 0)],
)
def test_the_cpu_is_divided_as_it_was_in_the_run(devices, divided, workdir):
  content = json.loads((workdir / 'config.json').read_text())
  (workdir / 'config.json').write_text(json.dumps({**content, 'devices': devices}))
  assert past_step.read_run(str(workdir))[0].system.cpu_devices == divided


def test_the_model_of_a_run_is_the_one_it_names_or_where_it_was(workdir, tmp_path):
  config = fake_run.config(3)
  assert past_step.base_of(str(workdir), config) == config.model
  content = json.loads((workdir / 'config.json').read_text())
  content['about'] = {'model': {'name': 'mine', 'directory': str(tmp_path)}}
  (workdir / 'config.json').write_text(json.dumps(content))
  assert past_step.base_of(str(workdir), config) == str(tmp_path)
  content['about']['model']['directory'] = str(tmp_path / 'gone')
  (workdir / 'config.json').write_text(json.dumps(content))
  with pytest.raises(InputError, match='--base=DIR'):
    past_step.base_of(str(workdir), config)
  assert past_step.base_of(str(workdir), config, str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
  'harm',
  [
    b'',
    b'{',
    b'[1]',
    b'7',
    b'{}',
    b'\xff',
    b'[' * 100_000,
    b'{"config": 3}',
    b'{"config": {"method": 3}}',
    b'{"config": {"method": {}, "system": []}}',
    b'{"config": {"model": "scenes"}}',
    b'{"config": {"method": {"grpo": 4, "ratio_low": 1.0}}}',
  ],
)
def test_a_damaged_configuration_is_one_sentence(harm, workdir):
  (workdir / 'config.json').write_bytes(harm)
  with pytest.raises(InputError):
    past_step.read_run(str(workdir))


def test_lines_of_metrics_that_are_none_are_left_out(workdir, capsys):
  text = (workdir / 'metrics.jsonl').read_text().replace('{"step": 2', '{"st')
  (workdir / 'metrics.jsonl').write_text(text)
  _, lines = past_step.read_run(str(workdir))
  assert sorted(lines) == [1, 3] and 'line 2 (' in capsys.readouterr().err
  (workdir / 'metrics.jsonl').unlink()
  _, lines = past_step.read_run(str(workdir))
  assert not lines and 'has no metrics.jsonl' in capsys.readouterr().err
  with pytest.raises(InputError, match='has run no step yet'):
    past_step.check_step(1, lines, str(workdir))
