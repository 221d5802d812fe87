"""Whatever is wrong with a stranger's file, it is one sentence, at once."""

import mutations


def test_faults_of_model_directories_and_configs_are_one_sentence_each(tmp_path):
  faults, refused = [], 0
  for case, said, seconds, error in mutations.run(0, 60, tmp_path):
    refused += ' -> ' in said
    if error is not None or seconds > mutations.SECONDS:
      faults.append((case, said[:200], round(seconds, 1), repr(error)))
  assert not faults
  assert refused > 12  # many mutations harm nothing; the others are found, not passed over
