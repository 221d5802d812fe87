"""The fixed list: the guard on its pictures, numbers whose answers are plain; and its programs."""

import re

import jax
import numpy as np
from places import CONFIGS
import pytest

from dsr_jax import config_loading, train
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


def test_in_scenes_the_list_is_sampled_by_the_programs_of_the_evaluation(caplog):
  how = dict(system__decode_segment=64, system__logprob_chunk=7, method__temperature=0.9)
  cfg = config_loading.load(str(CONFIGS / 'scenes_tiny.py'), **how)
  parts = train.Builders()
  mesh = parts.make_mesh(cfg.system.mesh)
  with jax.set_mesh(mesh), jax.log_compiles():
    model, cfg = train.framed(parts.load_model(cfg.model), cfg)
    batches = parts.make_batches(cfg, model, mesh, None)
    state = parts.init_state(model, cfg, mesh)
    jax.clear_caches()
    parts.make_evaluator(cfg, model)(state, 0)
    parts.make_watcher(cfg, model, batches, parts.load_model)(state, 0)
  compiled = re.findall(r'Compiling jit\((_sample_\w+)\)', caplog.text)
  # Images; descriptions, greedy descriptions, answers.
  assert sorted(compiled) == ['_sample_pictures'] + 3 * ['_sample_texts']
