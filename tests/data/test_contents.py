"""Contents of data: of several processes all must find the same at the same paths."""

from dsr_jax import config
from dsr_jax.data import contents


def test_what_lies_at_the_paths_of_the_data_is_compared_by_content(tmp_path):
  (tmp_path / 'pictures' / 'in').mkdir(parents=True)
  picture, prompts = tmp_path / 'pictures' / 'in' / 'a.png', tmp_path / 'prompts.txt'
  picture.write_bytes(b'first')
  prompts.write_text('a red circle\n')
  data = config.Data(images=str(tmp_path / 'pictures'), prompts=str(prompts))

  def changed(write):
    before = contents.of(data)
    write()
    after = contents.of(data)
    return [name for name in before if before[name] != after[name]]

  assert changed(lambda: picture.write_bytes(b'other')) == ['contents of data.images']
  assert changed(lambda: picture.rename(picture.with_name('b.png'))) == ['contents of data.images']
  assert changed(lambda: prompts.write_text('a red square\n')) == ['contents of data.prompts']
  assert changed(prompts.unlink) == ['contents of data.prompts']
  # What no run reads.
  assert not changed(lambda: (tmp_path / 'pictures' / '.DS_Store').write_bytes(b'x'))
  assert not changed(lambda: (tmp_path / 'pictures' / 'notes.txt').write_bytes(b'x'))


def test_of_a_large_folder_every_size_and_some_contents_are_compared(tmp_path, monkeypatch):
  monkeypatch.setattr(contents, 'PICTURES_READ', 2)
  for i in range(9):
    (tmp_path / f'{i}.png').write_bytes(bytes([i]))
  before = contents.of(config.Data(images=str(tmp_path)))
  found = []
  for i in range(9):
    for content in (b'x', b'xx'):
      (tmp_path / f'{i}.png').write_bytes(content)
      found.append((len(content), contents.of(config.Data(images=str(tmp_path))) != before))
    (tmp_path / f'{i}.png').write_bytes(bytes([i]))
  assert found.count((1, True)) == 2 and found.count((2, True)) == 9


def test_a_name_and_what_is_not_there_have_no_contents(tmp_path):
  found = contents.of(config.Data(images='scenes', prompts=str(tmp_path / 'none.txt')))
  assert set(found.values()) == {''}
  nothing = contents.of(config.Data(images=str(tmp_path)))  # an empty folder: its reader says so
  assert 'found no image' in nothing['contents of data.images']
