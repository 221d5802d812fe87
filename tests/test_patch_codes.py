"""The benchmark of what an image tokenizer's codes depend on."""

from absl import flags
import numpy as np
import pytest

from benchmarks import patch_codes


def test_the_entropy_is_that_of_codes_among_equal_patches():
  patches = np.array([[1], [1], [1], [1], [2], [2]], np.uint8)
  # Two codes equally often for patch 1, one for patch 2: (4 ln 2 + 0) / 6.
  codes = np.array([7, 8, 7, 8, 3, 3])
  assert patch_codes.code_entropy(patches, codes) == pytest.approx(4 * np.log(2) / 6)
  assert patch_codes.code_entropy(patches, codes, least=3) == pytest.approx(np.log(2))
  assert patch_codes.code_entropy(patches, codes, most=3) == 0
  assert np.isnan(patch_codes.code_entropy(patches, codes, least=9))


def test_the_command_prints_the_codes_of_the_embedded_model(capsys):
  f = flags.FlagValues()
  patch_codes.define_flags(f)
  f(['test', '--images=4'])
  patch_codes.main(['test'], f)
  assert '"codes_used"' in capsys.readouterr().out
