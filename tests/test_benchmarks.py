"""The benchmark against torch times two sides that do the same work."""

import pytest
import tiny_step

from benchmarks import generation
from dsr_jax.convert import locate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('objective', ['simpo', 'grpo'])
def test_both_sides_draw_score_and_learn_the_same_whatever_the_objective(objective, tmp_path):
  config = tiny_step.load(method__objective=objective, method__group_size=3)
  work = generation.prepare(locate.EMBEDDED, config, str(tmp_path))
  gaps = generation.check_same(generation.Jax(work), generation.Torch(work))
  assert set(gaps) == {'pixels', 'rewards', 'loss'}
  assert max(gaps.values()) < 2e-5
