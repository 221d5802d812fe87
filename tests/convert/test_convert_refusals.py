"""What `dsr_jax.convert` refuses, in one sentence and without a trace."""

import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import original_layout
from places import ROOT
import pytest
from safetensors.numpy import load_file, save_file
import torch

from dsr_jax import convert
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import directory as directory_lib
from dsr_jax.convert import writing
from dsr_jax.errors import InputError

WEIGHTS = 'model.safetensors'
KEPT = directory_lib.KEPT_ASIDE


def run(source, target, layout='hf', **options):
  return command.convert(str(source), str(target), layout, **options)


@pytest.mark.parametrize(
  'change, found',
  [
    (lambda d: (d / 'config.json').unlink(), 'no config.json'),
    (
      lambda d: (d / 'config.json').write_text(json.dumps(dict(model_type='llama'))),
      "type 'llama'",
    ),
    (lambda d: (d / 'tokenizer.json').unlink(), 'no tokenizer.json'),
    (lambda d: (d / 'pytorch_model.bin').unlink(), 'no weights'),
    (lambda d: (d / 'pytorch_model.bin').write_bytes(b''), 'truncated|damaged'),
    (
      lambda d: (d / 'pytorch_model.bin').write_bytes(
        (d / 'pytorch_model.bin').read_bytes()[:9999]
      ),
      'truncated|damaged',
    ),
    (lambda d: (d / 'pytorch_model.bin').rename(d / 'model.pth'), 'only model.pth'),
  ],
)
def test_a_damaged_source_is_one_sentence_and_leaves_nothing(
  original_copy, tmp_path, change, found
):
  change(original_copy)
  with pytest.raises(InputError, match=found) as e:
    run(original_copy, tmp_path / 'h')
  assert '\n' not in str(e.value) and re.search('; (check|fetch|use) ', str(e.value))
  assert [path.name for path in tmp_path.iterdir()] == ['copy']


def test_half_a_sharded_bin_is_refused(original, original_copy):
  (original_copy / 'pytorch_model.bin').unlink()
  original_layout.save_bins(original_copy, original[1], 3)
  (original_copy / 'pytorch_model-00002-of-00003.bin').unlink()
  with pytest.raises(InputError, match='pytorch_model-00002-of-00003.bin'):
    convert.load(original_copy)


def test_every_wrong_tensor_of_the_original_layout_is_named_in_one_error(original, original_copy):
  tensors = dict(original[1])
  del tensors['gen_embed.weight'], tensors['vision_model.vision_tower.attn_pool.kv.bias']
  tensors['surplus'] = torch.zeros(3)
  tensors['vision_model.vision_tower.blocks.0.attn.qkv.bias'] = torch.zeros(32)
  tensors['vision_model.vision_tower.pos_embed'] = tensors['vision_model.vision_tower.pos_embed'][0]
  tensors['aligner.layers.0.bias'] = torch.zeros(48, dtype=torch.int32)
  original_layout.save_bins(original_copy, tensors, 1)
  with pytest.raises(InputError) as e:
    convert.load(original_copy)
  for part in (
    '2 missing: gen_embed.weight, vision_model.vision_tower.attn_pool.kv.bias',
    '1 unknown: surplus',
    'attn.qkv.bias (32,) instead of (96,)',
    'pos_embed (16, 32) instead of (1, 16, 32)',
    'aligner.layers.0.bias I32',
  ):
    assert part in str(e.value)


def test_code_in_a_pickle_is_never_run(original_copy, tmp_path):

  class Evil:
    def __reduce__(self):
      return (pathlib.Path.touch, (tmp_path / 'ran',))

  for write in (
    lambda f: torch.save({'a': Evil()}, f),
    lambda f: f.write(pickle.dumps({'a': Evil()})),
  ):
    with open(original_copy / 'pytorch_model.bin', 'wb') as f:
      write(f)
    with pytest.raises(InputError, match='more than tensors|damaged') as e:
      convert.load(original_copy)
    assert '\n' not in str(e.value) and not (tmp_path / 'ran').exists()


def test_a_pickle_of_something_else_is_refused(original_copy):
  torch.save([torch.zeros(3)], original_copy / 'pytorch_model.bin')
  with pytest.raises(InputError, match='no plain state dict'):
    convert.load(original_copy)


def test_without_torch_a_bin_file_is_one_sentence(original_copy, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(InputError, match='torch is not installed'):
    convert.load(original_copy)


def test_kept_tensors_of_another_model_are_refused(original, tmp_path):
  run(original[0], tmp_path / 'h')
  tensors = load_file(tmp_path / 'h' / KEPT)
  save_file({**tensors, 'odd': np.zeros(2, np.float32)}, tmp_path / 'h' / KEPT)
  with pytest.raises(InputError, match='1 unknown: odd'):
    convert.load(tmp_path / 'h')


def test_a_full_target_is_refused_unless_overwritten(original, tmp_path):
  (tmp_path / 'h').mkdir()
  (tmp_path / 'h/mine.txt').write_text('keep')
  with pytest.raises(InputError, match='not empty.*--overwrite'):
    run(original[0], tmp_path / 'h')
  assert [path.name for path in (tmp_path / 'h').iterdir()] == ['mine.txt']
  run(original[0], tmp_path / 'h', overwrite=True)
  assert convert.load(tmp_path / 'h') and [path.name for path in tmp_path.iterdir()] == ['h']
  # Of an export in the other layout nothing stays, and nothing of the user's goes.
  (tmp_path / 'h/notes').mkdir()
  (tmp_path / 'h/notes/config.json').write_text('mine')
  run(original[0], tmp_path / 'h', 'deepseek', overwrite=True)
  found = {str(path.relative_to(tmp_path / 'h')) for path in (tmp_path / 'h').rglob('*.*')}
  mine = {'mine.txt', 'notes/config.json'}
  assert mine < found and all(writing.is_export(path) for path in found - mine)
  assert not any(path.startswith('kept_aside') for path in found)


def test_a_target_that_holds_the_source_is_refused_even_to_be_overwritten(
  original, make_run, tmp_path
):
  run(original[0], tmp_path / 'h')
  workdir = make_run(original_layout.head_of(original, 1.001))
  for source, target in (
    (tmp_path / 'h', tmp_path / 'h'),
    (tmp_path / 'h', tmp_path),
    (f'{workdir}@7', workdir),
    (workdir, workdir.parent),
  ):
    with pytest.raises(InputError, match='the target .* is or contains the source .*; name'):
      run(source, target, overwrite=True)
  assert convert.load(tmp_path / 'h') and (workdir / 'checkpoints/7').is_dir()


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(
  original, tmp_path, monkeypatch
):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1 << 20))())
  with pytest.raises(InputError, match='has 1 MiB free, but 4 MiB are needed'):
    run(original[0], tmp_path / 'h')
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_target_absent(original, tmp_path):
  """The system itself refuses to let a file grow beyond a megabyte."""
  code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ['convert', '--source={original[0]}', '--target={tmp_path / 'h'}', '--format=hf']
from dsr_jax.convert import __main__ as command
command.cli.run_main(command.main, command.define_flags)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == '', done.stderr
  assert (
    'error: ' in done.stderr
    and ' is not writable (' in done.stderr
    and 'Traceback' not in done.stderr
  )
  assert not list(tmp_path.iterdir())


def test_the_command_line(original, tmp_path):
  def call(*args):
    return subprocess.run(
      [sys.executable, '-m', 'dsr_jax.convert', *args], cwd=ROOT, capture_output=True, text=True
    )

  done = call(f'--source={original[0]}', f'--target={tmp_path / "h"}', '--format=hf')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['tensors'] == len(load_file(tmp_path / 'h' / WEIGHTS))
  for args, found in (
    (['--target=x', '--format=hf'], '--source is missing'),
    (
      ['--source=scenes', '--target=x', '--format=onnx'],
      '--format=onnx is unknown; choose hf or deepseek',
    ),
  ):
    done = call(*args)
    assert (
      done.returncode == 2
      and done.stdout == ''
      and done.stderr.startswith(f'error: {found}')
      and done.stderr.count('\n') == 1
    )
