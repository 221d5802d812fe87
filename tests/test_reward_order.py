"""How R_G orders the images of a model, by the judge."""

from absl import flags
import numpy as np
import pytest

from benchmarks import reward_order
from dsr_jax.scenes import grammar


def test_a_reward_that_follows_the_judge_orders_all_pairs_and_chooses_right_images():
  correct = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
  found = reward_order.of_task(correct - 2.0, correct)
  assert (found.ordered.value, found.best) == (1, 1)
  assert found.right == pytest.approx(6 / 9) and found.reward == pytest.approx(6 / 9 - 2)
  against = reward_order.of_task(-1.0 * correct, correct)
  assert against.ordered.value == 0 and against.best == pytest.approx(1 / 3)


def test_images_that_are_all_right_have_no_order():
  found = reward_order.of_task(np.zeros((2, 3)), np.ones((2, 3), bool))
  assert found.ordered is None and '|  |' in reward_order.line('scenes', 'colors', found)


def test_the_mean_is_of_tasks_and_the_order_of_all_pairs():
  rewards = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1.0]])
  correct = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
  found = reward_order.of_all(rewards, correct, np.array(['colors', 'counting', 'counting']))
  assert found['mean of six'].right == pytest.approx((1 / 4 + 4 / 8) / 2)
  orders = {name: task.ordered.value for name, task in found.items()}
  assert orders['colors'] == 1
  assert orders['counting'] == pytest.approx((2 * 0.5 + 0) / 6)  # one pair is wrong, two are ties
  assert orders['mean of six'] == pytest.approx((3 + 1) / 9)


def test_the_embedded_model_orders_most_pairs_rightly(capsys):
  f = flags.FlagValues()
  reward_order.define_flags(f)
  f(['test', '--models=scenes', '--prompts_per_task=4', '--samples=4'])
  reward_order.main(['test'], f)
  lines = capsys.readouterr().out.splitlines()[2:]
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
  assert [row[1] for row in cells] == ['mean of six', *grammar.GENEVAL]
  right, ordered, best = (float(cells[0][i].split()[0]) for i in (2, 5, 6))
  assert ordered > 60 and best > right
