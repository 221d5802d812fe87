"""What is held out of one's own prompts and pictures is never learned from, whatever becomes of the
list.
"""

from micro_parts import Words
import numpy as np
from PIL import Image
import pytest

from dsr_jax import config as config_lib
from dsr_jax.data import batches as batches_lib
from dsr_jax.data import t2i_compbench
from dsr_jax.data.held_out import Apart, number
from dsr_jax.errors import InputError
from dsr_jax.scenes import sets

LINES = [f'prompt {i}' for i in range(30)]
TENTH = Apart(share=0.1)


def picture(i):
  return Image.new('RGB', (20, 30), (i, 100, 200))


def make(tmp_path, lines=None, apart=TENTH, task='unified', prompts='', images=''):
  """Batches over a file of lines and whatever pictures the folder has."""
  file, folder = tmp_path / 'prompts.txt', tmp_path / 'images'
  file.write_text('\n'.join(LINES if lines is None else lines))
  if not folder.exists():
    folder.mkdir()
    for i in range(20):
      picture(i).save(folder / f'{i:03d}.png')
  data = config_lib.Data(prompts=prompts or str(file), images=images or str(folder))
  method = config_lib.Method(task=task, inputs_per_step=8, question='q?', instruction='i!')
  return batches_lib.make(data, method, Words(), 16, apart=apart)


def shown(made):
  """(prompts, red of pictures) of the batches of three epochs at least."""
  prompts, red = set(), set()
  for step in range(30):
    batch = made.at(step)
    prompts |= set(made.texts_at(step))
    red |= {int(pixels[8, 8, 0]) for pixels in batch.understanding.pixels}
  return prompts, red


def measured(made):
  texts, pictures = made.prompts.measured, made.pictures.measured
  red = pictures.take(range(len(pictures)))[:, 8, 8, 0]
  return {texts[i] for i in range(len(texts))}, set(red.tolist())


@pytest.mark.parametrize(
  'share, items, expected',
  [
    *[(0.1, 1000, 64), (0.1, 300, 30), (0.1, 30, 4), (0.1, 6, 3), (0.1, 1, 0), (0.1, 0, 0)],
    *[(0.5, 40, 20), (0.9, 40, 20), (0.0, 1000, 0)],
  ],
)
def test_a_share_is_held_out_but_4_at_least_64_at_most_and_never_more_than_half(
  share, items, expected
):
  assert number(share, items) == expected


def test_what_is_measured_on_is_never_learned_from_and_all_else_is(tmp_path):
  made = make(tmp_path)
  prompts, red = shown(made)
  apart, apart_red = measured(made)
  assert len(apart) == len(apart_red) == 4
  assert prompts == set(LINES) - apart and red == set(range(20)) - apart_red
  assert len(made.held_out['prompts']) == len(made.held_out['pictures']) == 4


def test_nothing_is_held_out_unless_asked(tmp_path):
  made = make(tmp_path, apart=Apart())
  assert shown(made) == (set(LINES), set(range(20)))
  assert made.held_out == {} and made.prompts.measured is None and made.pictures.measured is None
  # A run tells its data from others by all of them.
  assert made.fingerprint == make(tmp_path).fingerprint
  assert made.sizes() == make(tmp_path).sizes() == {'prompts': 30, 'pictures': 20}


def test_equal_ones_are_on_the_same_side(tmp_path):
  apart = measured(make(tmp_path))[0]
  again = make(tmp_path, lines=LINES + sorted(apart))
  assert measured(again)[0] == apart and len(again.prompts.measured) == 4
  assert not shown(again)[0] & apart


def test_names_and_places_do_not_matter(tmp_path):
  before = measured(make(tmp_path))
  folder = tmp_path / 'images'
  for i, path in enumerate(sorted(folder.glob('*.png'))):
    path.rename(folder / f'other_{99 - i}.png')
  assert measured(make(tmp_path, lines=LINES[::-1])) == before


def test_a_run_that_goes_on_with_a_changed_list_keeps_what_it_holds_out(tmp_path):
  made = make(tmp_path)
  prompts, red = measured(made)
  gone, gone_red = min(prompts), min(red)
  (tmp_path / 'images' / f'{gone_red:03d}.png').unlink()
  for i in range(100, 140):
    picture(i).save(tmp_path / 'images' / f'{i:03d}.png')
  lines = [line for line in LINES if line != gone] + [f'new prompt {i}' for i in range(500)]
  again = make(tmp_path, lines=lines, apart=Apart(share=0.1, kept=made.held_out))
  assert measured(again) == (prompts - {gone}, red - {gone_red})
  assert again.held_out == made.held_out  # one that comes back is held out still
  learned = {again.prompts.learned[i] for i in range(len(again.prompts.learned))}
  assert learned == set(lines) - prompts
  # Whereas a run that begins would choose others.
  assert measured(make(tmp_path, lines=lines))[0] != prompts


def test_a_run_that_began_without_goes_on_without(tmp_path):
  assert make(tmp_path, apart=Apart(share=0.1, kept={})).held_out == {}


def test_a_run_needs_something_to_learn_from(tmp_path):
  made = make(tmp_path)
  lines = sorted(measured(made)[0])
  with pytest.raises(InputError, match='data.prompts has nothing but the 4 items that this run'):
    make(tmp_path, lines=lines, apart=Apart(kept=made.held_out))


def test_named_sets_are_learned_from_whole_and_measured_on_their_validation_lists(tmp_path):
  apart = Apart(share=0.1, listed=16)
  made = make(tmp_path, apart=apart, prompts='t2i_compbench', task='generation')
  assert len(made.prompts.learned) == 5600 and made.held_out == {}
  found = [made.prompts.measured[i] for i in range(16)]
  listed = {text for _, _, text in t2i_compbench.lines('val')}
  assert len(made.prompts.measured) == 16 and set(found) <= listed
  assert made.prompts.measured.where(9) == 'line 2 of shape_val.txt'


def test_of_a_mixture_each_part_has_its_own(tmp_path):
  file = tmp_path / 'prompts.txt'
  prompts = f'scenes:50+{file}'
  made = make(tmp_path, apart=Apart(share=0.1, listed=6), prompts=prompts, task='generation')
  found = [made.prompts.measured[i] for i in range(len(made.prompts.measured))]
  assert found[:6] == [prompt.text for prompt in sets.mixed_prompts(6)]
  assert len(found) == 10 and set(found[6:]) <= set(LINES)
  assert len(made.prompts.learned) == 50 + 26


def test_a_picture_that_goes_bad_is_replaced_by_one_of_its_own_side(tmp_path):
  make(tmp_path)
  data = config_lib.Data(
    prompts=str(tmp_path / 'prompts.txt'), images=str(tmp_path / 'images'), bad_images='skip'
  )
  method = config_lib.Method(task='understanding', inputs_per_step=4, question='q?')
  made = batches_lib.make(data, method, Words(), 16, apart=TENTH)
  parts = made.pictures
  apart = set(parts.measured.take(range(4))[:, 8, 8, 0].tolist())
  for path in (tmp_path / 'images').glob('*.png'):
    if int(path.stem) not in apart and int(path.stem) != max(set(range(20)) - apart):
      path.write_bytes(b'')
  red = np.concatenate([made.at(step).understanding.pixels[:, 8, 8, 0] for step in range(8)])
  assert set(red.tolist()) == {max(set(range(20)) - apart)}
