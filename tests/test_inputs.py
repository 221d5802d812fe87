"""Files that are none, and bytes that are no text, are refused at once and in one sentence."""

import os
import socket

from PIL import Image
import pytest

from dsr_jax import cli, files, images, inputs
from dsr_jax.data import prompts
from dsr_jax.errors import InputError


@pytest.fixture(params=['pipe', 'socket', 'folder', 'device', 'loop', 'dangling link', 'absent'])
def no_file(request, tmp_path):
  """A path at which there is no plain file."""
  path = tmp_path / 'x.png'
  if request.param == 'pipe':
    os.mkfifo(path)
  elif request.param == 'socket':
    with socket.socket(socket.AF_UNIX) as listening:
      listening.bind(str(path))
  elif request.param == 'folder':
    path.mkdir()
  elif request.param == 'device':
    return '/dev/zero'
  elif request.param == 'loop':
    path.symlink_to(path)
  elif request.param == 'dangling link':
    path.symlink_to(tmp_path / 'gone')
  return str(path)


@pytest.mark.parametrize('read', [images.load_image, prompts.read_lines])
def test_what_is_no_file_is_refused_at_once(no_file, read):
  with pytest.raises(InputError, match='^cannot read') as e:
    read(no_file)
  assert no_file in str(e.value) and '\n' not in str(e.value)


def test_a_link_to_a_file_is_followed(tmp_path):
  Image.new('RGB', (3, 2)).save(tmp_path / 'x.png')
  (tmp_path / 'y').symlink_to('x.png')
  assert images.load_image(tmp_path / 'y').size == (3, 2)


def test_a_name_that_is_not_utf8_is_read_and_shown(tmp_path):
  name = os.path.join(os.fsencode(tmp_path), b'caf\xe9.bmp')
  Image.new('RGB', (3, 2)).save(open(name, 'wb'), 'BMP')
  assert images.load_image(name).size == images.load_image(os.fsdecode(name)).size == (3, 2)
  with open(name, 'wb') as f:
    f.write(b'no picture')
  with pytest.raises(InputError, match=r'caf\\xe9\.bmp is not a readable image'):
    images.load_image(os.fsdecode(name))


def test_a_path_that_is_not_utf8_is_printed_and_written_as_json(tmp_path, capsys):
  value = {'image': os.fsdecode(b'caf\xe9.bmp'), 'text': 'caf\u00e9'}
  cli.print_json(value)
  printed = capsys.readouterr().out
  assert r'caf\udce9.bmp' in printed and 'caf\u00e9' in printed
  path = files.write_json(tmp_path / 'x.json', value, ensure_ascii=False)
  assert files.read_json(path) == value


def test_a_text_flag_of_other_bytes_is_refused():
  inputs.check_text(prompt='a r\u00e9d disc', instruction=None)
  with pytest.raises(InputError, match=r'--prompt=a red \\xff disc contains bytes .* not UTF-8'):
    inputs.check_text(prompt=os.fsdecode(b'a red \xff disc'))


@pytest.mark.parametrize('text', ['', ' ', '\ufeff', '\u200b \u2060', '\x00\t', '\xa0\u2028'])
def test_a_text_with_nothing_to_see_is_none(text):
  assert not inputs.is_visible(text)
  assert inputs.is_visible(f'{text}\u4e2d{text}') and inputs.is_visible(f'{text}.')
