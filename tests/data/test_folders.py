"""A folder of pictures: what counts as one, that all are looked at beforehand, and that their
contents tell them apart.
"""

import io
import os

import numpy as np
from PIL import Image
import pytest

from dsr_jax import images as border
from dsr_jax.data import folders, images
from dsr_jax.errors import InputError


def picture(form='PNG', size=(12, 10), shade=(10, 200, 30)):
  file = io.BytesIO()
  Image.new('RGB', size, shade).save(file, form)
  return file.getvalue()


def write(folder, **content):
  """Files by name; `__` stands for '/', `_dot_` for '.'."""
  for name, data in content.items():
    path = folder / name.replace('__', '/').replace('_dot_', '.')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pictures_of(folder, size=16, **how):
  stored = folders.Folder(str(folder), **how)
  return images.decoded(stored, range(len(stored)), size)


@pytest.fixture
def looked(monkeypatch):
  """The paths of the files that are looked into."""
  paths, look = [], folders._look

  def looking(path, decode):
    paths.append(path)
    return look(path, decode)

  monkeypatch.setattr(folders, '_look', looking)
  return paths


# What counts.


def test_a_folder_is_read_sorted_with_subfolders_and_without_hidden_files(tmp_path):
  for name in ('b.PNG', 'a/z.jpg', 'a.jpeg', '.hidden.png', '.git/x.png', 'notes.txt'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  found = folders.find(str(tmp_path))
  assert found.names == ['a.jpeg', 'a/z.jpg', 'b.PNG']
  assert found.passed_over == {'hidden': ['.git', '.hidden.png'], 'unrecognized': ['notes.txt']}


def test_contents_decide_what_a_picture_is(tmp_path):
  write(
    tmp_path,
    a_dot_avif=picture('AVIF'),
    b_dot_jfif=picture('JPEG'),
    c=picture('JPEG'),
    d_dot_data=picture('WEBP'),
    e=b'words',
    f_dot_h=b'#define x 3',
    g_dot_zip=b'PK\x03\x04',
  )
  found = folders.find(str(tmp_path))
  assert found.names == ['a.avif', 'b.jfif', 'c', 'd.data']
  assert found.passed_over == {'unrecognized': ['e', 'f.h', 'g.zip']}
  assert pictures_of(tmp_path).take(range(4)).shape == (4, 16, 16, 3)


def test_links_are_followed_once_a_real_folder_and_links_to_nothing_passed_over(tmp_path):
  write(tmp_path / 'in', b__x_dot_png=picture())
  write(tmp_path / 'out', y_dot_png=picture())
  os.symlink(tmp_path / 'out', tmp_path / 'in' / 'link')
  os.symlink(tmp_path / 'in' / 'b', tmp_path / 'in' / 'a')  # before b, and yet b is read as b
  os.symlink(tmp_path / 'in', tmp_path / 'in' / 'b' / 'circle')
  os.symlink(tmp_path / 'nowhere.png', tmp_path / 'in' / 'gone.png')
  os.symlink(tmp_path / 'out' / 'y.png', tmp_path / 'in' / 'file.png')
  os.mkfifo(tmp_path / 'in' / 'pipe.png')
  found = folders.find(str(tmp_path / 'in'))
  assert found.names == ['b/x.png', 'file.png', 'link/y.png']
  assert found.passed_over == {
    'links to folders that are read': ['a', 'b/circle'],
    'links to nothing': ['gone.png'],
    'no plain files': ['pipe.png'],
  }


def test_what_is_passed_over_is_counted_and_said(tmp_path, capsys):
  write(tmp_path, a_dot_png=picture(), b_dot_txt=b'x', c_dot_txt=b'y')
  folders.Folder(str(tmp_path))
  assert f'passed over  in {tmp_path}: 2 unrecognized (b.txt, c.txt)' in capsys.readouterr().err


def test_a_folder_without_images_is_one_sentence(tmp_path):
  (tmp_path / 'notes.txt').write_text('')
  with pytest.raises(
    InputError, match=r'there is no image in .* \(1 unrecognized \(notes\.txt\)\);'
  ):
    folders.find(str(tmp_path))
  with pytest.raises(InputError, match='there is no folder'):
    folders.find(str(tmp_path / 'absent'))


# All are looked at beforehand.


def test_all_pictures_that_do_not_decode_are_named_together(tmp_path):
  whole = picture(size=(64, 64))
  write(tmp_path, a=whole[:-30], b_dot_jpg=b'', c_dot_png=whole, d_dot_gif=b'words')
  with pytest.raises(InputError) as e:
    folders.Folder(str(tmp_path))
  said = str(e.value)
  assert 'found 3 of 4 images' in said and 'data.bad_images=skip' in said
  assert 'b.jpg: empty file' in said and 'd.gif: unknown format' in said and 'a: ' in said
  assert '\n' not in said


def test_pictures_that_do_not_decode_are_left_out_on_request_and_counted(tmp_path, capsys):
  whole = picture(size=(64, 64))
  write(tmp_path, a_dot_png=whole, b_dot_png=whole[:-30], c_dot_png=picture(shade=(1, 2, 3)))
  made = pictures_of(tmp_path, bad_images='skip')
  assert 'left out     1 of 3 images' in capsys.readouterr().err
  assert len(made) == 2 and made[1][8, 8].tolist() == [1, 2, 3]
  write(tmp_path, a_dot_png=b'', c_dot_png=b'')
  with pytest.raises(InputError, match='found 3 of 3 images'):
    folders.Folder(str(tmp_path), bad_images='skip')


def test_of_a_large_folder_some_are_decoded_the_same_for_a_seed(tmp_path, looked, monkeypatch):
  monkeypatch.setattr(folders, 'DECODED', 20)
  monkeypatch.setattr(folders, 'SAMPLED', 6)
  for i in range(30):
    write(tmp_path, **{f'{i:02d}_dot_png': picture(shade=(i, 0, 0))})
  seen = []
  for seed in (3, 3, 4):
    monkeypatch.setenv('DSR_JAX_CACHE', str(tmp_path / f'.cache{len(seen)}'))
    looked.clear()
    folders.Folder(str(tmp_path), seed=seed)
    seen.append(sorted(looked))
  assert len(seen[0]) == 6 and seen[0] == seen[1] != seen[2]


def decodes(function, data):
  try:
    function(io.BytesIO(data))
  except InputError:
    return False
  return True


@pytest.mark.parametrize(
  'form', [{}, {'progressive': True}, {'subsampling': 0}, {'restart_marker_rows': 1}]
)
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_jpegs_are_verified_at_an_eighth_with_the_verdict_of_the_whole(mode, form):
  rng = np.random.default_rng(0)
  file = io.BytesIO()
  pixels = rng.integers(0, 256, (37, 61, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(file, 'JPEG', **form)
  whole = file.getvalue()
  damaged = [whole[:end] for end in range(1, len(whole) + 1, 41)] + [whole]
  for _ in range(40):
    flipped = bytearray(whole)
    flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    damaged.append(bytes(flipped))
  verdicts = [
    [decodes(function, data) for data in damaged]
    for function in (border.load_image, lambda f: border.verify(f, 'x'))
  ]
  assert verdicts[0] == verdicts[1] and {True, False} <= set(verdicts[0])


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'GIF', 'TIFF', 'WEBP'])
def test_verify_tells_format_and_size(form):
  assert border.verify(io.BytesIO(picture(form, (30, 20))), 'x') == (form, (30, 20))


def test_a_picture_that_goes_bad_later_is_an_error_or_gives_way_to_the_next(tmp_path, capsys):
  for i in range(3):
    write(tmp_path, **{f'{i}_dot_png': picture(shade=(i, 0, 0))})
  made = {}
  for bad in ('error', 'skip'):
    stored = folders.Folder(str(tmp_path), bad)
    made[bad] = images.decoded(stored, range(3), 16, bad_images=bad)
  (tmp_path / '2.png').write_bytes(b'')
  with pytest.raises(InputError, match=r'2\.png'):
    made['error'].take([0, 2])
  assert [int(p[8, 8, 0]) for p in made['skip'].take([2, 1, 2])] == [0, 1, 0]
  assert capsys.readouterr().err.count('2.png') == 1


# Contents tell them apart.


def fingerprint(folder):
  return pictures_of(folder).fingerprint()


def test_contents_and_names_are_a_folders_identity_and_not_its_times_or_place(tmp_path):
  for folder in ('a', 'b'):
    write(tmp_path / folder, x_dot_png=picture(), y_dot_png=picture(shade=(0, 0, 0)))
  os.utime(tmp_path / 'b' / 'x.png', (1, 1))
  first = fingerprint(tmp_path / 'a')
  assert fingerprint(tmp_path / 'b') == first
  # Another picture under the same name, of the same size and the same time.
  path, other = tmp_path / 'a' / 'x.png', picture(shade=(11, 200, 30))
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  assert len(other) == path.stat().st_size
  path.write_bytes(other)
  os.utime(path, ns=times)
  assert fingerprint(tmp_path / 'a') != first


def test_what_is_known_of_a_file_is_kept_until_the_file_changes(tmp_path, looked, monkeypatch):
  monkeypatch.setattr(folders, 'RACY_NS', -(10**12))  # no file is too new
  monkeypatch.setenv('DSR_JAX_CACHE', str(tmp_path / 'cache'))
  write(tmp_path / 'in', a_dot_png=picture(), b_dot_png=picture())
  first = fingerprint(tmp_path / 'in')
  assert len(looked) == 2
  assert fingerprint(tmp_path / 'in') == first and len(looked) == 2
  write(tmp_path / 'in', b_dot_png=picture(size=(30, 30)))
  assert fingerprint(tmp_path / 'in') != first and len(looked) == 3
  for path in (tmp_path / 'cache' / 'pictures').iterdir():
    path.write_text('[1')  # damaged: looked at anew
  fingerprint(tmp_path / 'in')
  assert len(looked) == 5


def test_a_file_that_changed_just_now_is_looked_at_again(tmp_path, looked, monkeypatch):
  monkeypatch.setenv('DSR_JAX_CACHE', str(tmp_path / 'cache'))
  write(tmp_path / 'in', a_dot_png=picture())
  for _ in range(2):
    folders.inspect(str(tmp_path / 'in'), ['a.png'], decode=True)
  assert len(looked) == 2


def test_without_a_place_for_the_cache_all_goes_on(tmp_path, monkeypatch):
  monkeypatch.setenv('DSR_JAX_CACHE', '/proc/nowhere')
  write(tmp_path, a_dot_png=picture())
  assert len(pictures_of(tmp_path)) == 1
