"""How R_G orders the images of a model, by the judge."""

from absl import flags
import numpy as np
import pytest

from benchmarks import reward_order
from dsr_jax.scenes import grammar


def test_a_reward_that_follows_the_judge_orders_all_pairs_and_chooses_right_images():
  correct = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
  found = reward_order.of_task(correct - 2.0, correct)
  assert (found.ordered, found.best) == (1, 1)
  assert found.right == pytest.approx(6 / 9) and found.reward == pytest.approx(6 / 9 - 2)
  against = reward_order.of_task(-1.0 * correct, correct)
  assert against.ordered == 0 and against.best == pytest.approx(1 / 3)


def test_images_that_are_all_right_have_no_order():
  found = reward_order.of_task(np.zeros((2, 3)), np.ones((2, 3), bool))
  assert found.ordered is None and '|  |' in reward_order.line('scenes', 'colors', found)
  assert reward_order.mean_of([found, found._replace(ordered=0.5)]).ordered == 0.5


def test_the_embedded_model_orders_most_pairs_rightly(capsys):
  f = flags.FlagValues()
  reward_order.define_flags(f)
  f(['test', '--models=scenes', '--prompts_per_task=4', '--samples=4'])
  reward_order.main(['test'], f)
  lines = capsys.readouterr().out.splitlines()[2:]
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
  assert [row[1] for row in cells] == ['mean of six', *grammar.GENEVAL]
  mean = dict(zip(('right', 'reward', 'spread', 'ordered', 'best'), map(float, cells[0][2:])))
  assert mean['ordered'] > 60 and mean['best'] > mean['right']
