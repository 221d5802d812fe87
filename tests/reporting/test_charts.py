"""Charts: what a reader could take wrongly is not drawn."""

import re

import numpy as np
import pytest

from dsr_jax.reporting import charts
from dsr_jax.reporting.charts import Series

CURVES = {
  'one point': [1.0],
  'nothing': [0.0, 0.0],
  'tiny': [1e-9, 2e-9],
  'both signs, large': [1e7, -1e7],
  'constant': [3.0] * 50,
  'bytes': [2.1e9, 2.1e9 + 4096, 2.2e9],
  'a learning rate': [1e-6 * i for i in range(11)],
  'close and large': [1e5, 1e5 + 1],
  'a hair apart': [1e7, 1e7 + 1e-6],
  'shares': [0.97, 1.0],
  'below': [-1.5, -1.49],
}


def chart(values, **how):
  return charts.chart('t', 'u', [Series('a', 'other', list(range(len(values))), values, **how)])


@pytest.mark.parametrize('name', CURVES)
def test_any_finite_curve_lies_within_the_drawing(name):
  found = chart(CURVES[name])
  (curve,) = found.curves
  numbers = [float(x) for x in re.split('[ ,]', curve.line)]
  x, y = numbers[::2], numbers[1::2]
  assert min(x) >= found.left - 0.1 and max(x) <= found.right
  assert min(y) >= charts.TOP - 0.1 and max(y) <= found.bottom + 0.1


@pytest.mark.parametrize('name', CURVES)
def test_labels_are_distinct_numbers_that_fit(name):
  found = chart(CURVES[name])
  labels = [tick.label for tick in found.y_ticks]
  assert len(set(labels)) == len(labels) > 1
  assert all(re.fullmatch(r'-?\d+(\.\d+)?', label) and label != '-0' for label in labels)
  assert all(found.left - 6 - charts.DIGIT * len(label) >= 0 for label in labels)
  assert found.x_title == 'step'


@pytest.mark.parametrize('last', [1, 7, 438, 12_345, 1_000_000])
def test_labels_of_steps_are_whole_distinct_and_not_cut_off(last):
  found = charts.chart('t', '', [Series('a', 'other', [0, last], [0.0, 1.0])])
  labels = [int(tick.label) for tick in found.x_ticks]
  assert labels == sorted(set(labels)) and labels[-1] <= last
  for tick in found.x_ticks:
    width = charts.DIGIT * len(tick.label)
    assert tick.at + (width / 2 if tick.anchor == 'middle' else 0) <= charts.WIDTH


def test_a_power_of_ten_stands_beside_the_unit():
  found = chart([1e-5, 3e-5])
  assert found.unit == 'u × 10⁻⁵' and [tick.label for tick in found.y_ticks][0] == '1.0'
  assert chart([0.5, 3.0]).unit == 'u'


@pytest.mark.parametrize('values', [[1.0], [1.0, 1.0], [0.0, 0.0], [0.2, 1.0], [0.96, 0.99], [0.5]])
def test_the_axis_of_a_share_does_not_leave_0_to_1(values):
  ticks = [float(tick.label) for tick in chart(values).y_ticks]
  assert min(ticks) >= 0 and max(ticks) <= 1


def test_a_spike_does_not_become_a_plateau_and_lines_stay_lines():
  values = [1.0] * 100
  for i in (0, 40, 41, 99):
    values[i] = 50.0
  assert set(charts.smoothed(values)) == {1.0}
  line = [2.0 * i for i in range(100)]
  assert np.allclose(charts.smoothed(line)[5:-5], line[5:-5])


def test_only_noise_is_smoothed():
  values = [float(i % 7) for i in range(60)]
  assert chart(values).curves[0].raw and not chart(values).curves[0].dots
  schedule = chart(values, smooth=False).curves[0]
  assert not schedule.raw and schedule.line == chart(values).curves[0].raw
