"""True pairs for fine-tuning: what the judge of Scenes reads in them."""

from benchmarks import clean_pairs
from dsr_jax.scenes import judge


def test_an_image_shows_what_its_prompt_says_and_nothing_else():
  for index in range(24):
    prompt, pixels = clean_pairs.drawing_pair(0, index)
    (reading,) = judge.read(pixels[None])
    assert judge.strict(judge.parse(prompt), reading), prompt


def test_a_text_states_only_what_its_image_shows_and_omits_no_thing():
  for index in range(24):
    pixels, text = clean_pairs.describing_pair(0, index)
    (reading,) = judge.read(pixels[None])
    counts = judge.count_atoms(text, reading.scene)
    assert counts.parsed and counts.right == counts.stated, text
    assert len(judge.expand(judge.parse(text))) == len(reading.things), text


def test_another_seed_gives_other_pairs():
  assert clean_pairs.drawing_pair(0, 0)[0] != clean_pairs.drawing_pair(1, 0)[0]
