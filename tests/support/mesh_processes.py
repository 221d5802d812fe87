"""mesh_run.py as a process, and two of its results compared."""

import os
import subprocess
import sys

import numpy as np
from places import ROOT, SUPPORT


def start(*args):
  """mesh_run.py as a process."""
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  return subprocess.Popen(
    [sys.executable, SUPPORT / 'mesh_run.py', *map(str, args)],
    env={**env, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  out, _ = process.communicate(timeout=3000)
  assert process.returncode == 0, out[-3000:]


def load(folder, name):
  with np.load(folder / f'{name}.npz') as f:
    return dict(f)


def assert_same_step(a, b):
  """Random bits and candidates identical; gradients within 1e-4 a leaf; parameters within 1e-3 of
  the update.
  """
  np.testing.assert_array_equal(a['bits'], b['bits'])
  for key in (
    'record/generation/codes',
    'record/understanding/text_ids',
    'record/understanding/text_mask',
  ):
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)

  def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))

  def of(part):
    return [k for k in a if k.startswith(f'{part}/')]

  for key in of('mu'):  # after one update the first moment is the gradient, but for a factor
    assert norm(a[key] - b[key]) <= 1e-4 * norm(a[key]), key
  moved = np.sqrt(sum(norm(a[k] - a[k.replace('after', 'before', 1)]) ** 2 for k in of('after')))
  apart = np.sqrt(sum(norm(a[k] - b[k]) ** 2 for k in of('after')))
  assert moved > 0 and apart <= 1e-3 * moved, (apart, moved)
  for key in of('metric'):
    np.testing.assert_allclose(a[key], b[key], rtol=2e-4, atol=2e-5, err_msg=key)
