"""The guard on the pictures of the fixed prompts: numbers of pictures whose answers are plain."""

import numpy as np
import pytest

from dsr_jax.evaluate import watched


def guard(pixels):
  """Of one picture (H, W, 3)."""
  found = watched.guard(np.asarray(pixels, np.uint8)[None, None])
  return {name.removeprefix('watched/'): value.item() for name, value in found.items()}


def test_a_black_picture_is_dark_empty_and_of_one_color():
  assert guard(np.zeros((8, 8, 3))) == {'dark_pixels': 1, 'edge_density': 0, 'color_entropy': 0}


def test_a_checkerboard_is_all_edges_half_dark_and_of_two_colors():
  board = (np.indices((8, 8)).sum(axis=0) % 2)[..., None] * np.full(3, 255)
  found = guard(board)
  assert found['edge_density'] == 1 and found['dark_pixels'] == 0.5
  assert found['color_entropy'] == pytest.approx(np.log(2))


def test_one_edge_is_counted_where_it_is():
  pixels = np.full((4, 4, 3), 255)
  pixels[:, 2:] = 60
  found = guard(pixels)
  assert found['edge_density'] == pytest.approx((4 / 12 + 0) / 2)  # of 12 pairs across, 12 down
  assert found['dark_pixels'] == 0


def test_every_picture_has_numbers_of_its_own():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (2, 3, 8, 8, 3), np.uint8)
  for name, values in watched.guard(pixels).items():
    each = [[guard(picture)[name.removeprefix('watched/')] for picture in row] for row in pixels]
    assert values == pytest.approx(np.array(each))


def test_the_mean_of_sums_is_that_of_all_samples():
  rewards = np.random.default_rng(0).normal(size=(5, 4))
  sums = watched.row_sums(rewards)
  assert watched.mean_of_rows(sums.sum(axis=0)[None])[0] == pytest.approx(rewards.mean())
