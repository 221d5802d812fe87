"""The judge of Scenes for the rewards `judge` and `judge_strict`, called on the host from inside a
step. They are controls, never the default reward.

Axes: B inputs, G candidates, T tokens.
"""

import numpy as np

from dsr_jax.scenes import judge


def verdicts_on_pictures(pixels, ids, mask, token_bytes, token_ends, rule=judge.graded):
  """Verdicts of a rule on each image, (B, G) float32; 0 if the prompt is not one of Scenes.

  rule: (atoms, reading) -> a verdict in [0, 1]: `judge.graded`, the share of the prompt's atoms
  that the image shows, or `judge.strict`.

  pixels (B, G, 32, 32, 3) uint8; ids, mask (B, T) of the prompts; token_bytes, token_ends from
  `data.fields`.
  """
  pixels = np.asarray(pixels)
  texts = _texts(ids, mask, token_bytes, token_ends)
  atoms = [judge.parse(text) for text in texts]
  readings = judge.read(pixels.reshape(-1, *pixels.shape[2:]))
  group = pixels.shape[1]
  verdicts = [
    0.0 if atoms[i // group] is None else rule(atoms[i // group], reading)
    for i, reading in enumerate(readings)
  ]
  return np.array(verdicts, np.float32).reshape(pixels.shape[:2])


def verdicts_on_texts(pixels, ids, mask, token_bytes, token_ends):
  """F1 of the atoms that each text states about its image, (B, G) float32.

  pixels (B, 32, 32, 3) uint8; ids, mask (B, G, T) of the texts, without EOS.
  """
  ids, mask = np.asarray(ids), np.asarray(mask)

  def flat(x):
    return x.reshape(-1, x.shape[-1])

  texts = _texts(flat(ids), flat(mask), token_bytes, token_ends)
  scenes = [reading.scene for reading in judge.read(np.asarray(pixels))]
  group = ids.shape[1]
  return np.array(
    [_f1(text, scenes[i // group]) for i, text in enumerate(texts)], np.float32
  ).reshape(ids.shape[:2])


def _f1(text, scene):
  if scene is None:
    return 0.0
  counts = judge.count_atoms(text, scene)
  precision, recall = counts.right / max(counts.stated, 1), counts.recalled / max(counts.total, 1)
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _texts(ids, mask, token_bytes, token_ends):
  data, ends = np.asarray(token_bytes).tobytes(), np.asarray(token_ends)
  starts = np.concatenate([[0], ends[:-1]])

  def word(i):
    return (
      data[starts[i] : ends[i]] if i < len(ends) else b'?'
    )  # rows of the embedding beyond the tokenizer's vocabulary

  return [
    b''.join(word(i) for i in row[keep]).decode('utf-8', 'replace').strip()
    for row, keep in zip(np.asarray(ids), np.asarray(mask))
  ]
