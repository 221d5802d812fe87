"""What a user may call a model."""

import fnmatch

import huggingface_hub
import jax
import numpy as np
import original_layout
import pytest
import torch

from dsr_jax import convert
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError


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
  assert model_source._split(name) == parts


@pytest.mark.parametrize(
  'name, found',
  [
    ('plain@3', 'found a step'),
    ('plain:generator', 'found a role'),
    ('plain@3:generator', 'found a'),
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
