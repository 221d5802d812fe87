"""An empty instruction is a setting: R_G then asks the model nothing before the prompt."""

import numpy as np
import pytest
import tiny_step

from dsr_jax.errors import InputError
from dsr_jax.models.common.splice import spliced


def test_nothing_is_spliced_without_a_gap():
  nothing = np.zeros((2, 0), 'i4')
  ids, length = spliced((1, 2), nothing, nothing.astype(bool), (3, 4), pad_id=0)
  assert np.asarray(ids)[:, :4].tolist() == [[1, 2, 3, 4]] * 2 and length.tolist() == [4, 4]


def test_a_config_may_ask_nothing_before_the_prompt():
  assert tiny_step.load(method__instruction='').method.instruction == ''
  with pytest.raises(InputError, match='method.question'):
    tiny_step.load(method__question='')
