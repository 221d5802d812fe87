"""The notebook runs as it stands, in a folder of its own, with few steps."""

import json
import os
import sys

from places import ROOT
import pytest

NOTEBOOK = ROOT / 'examples' / 'quickstart.ipynb'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  nbclient = pytest.importorskip('nbclient')
  nbformat = pytest.importorskip('nbformat')
  folder = tmp_path_factory.mktemp('notebook')
  # A kernel of this interpreter, whatever is registered on the machine.
  kernel = folder / 'kernels' / 'python3'
  kernel.mkdir(parents=True)
  start = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  about = {'argv': start, 'display_name': 'Python 3', 'language': 'python'}
  (kernel / 'kernel.json').write_text(json.dumps(about))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JUPYTER_PATH', str(folder))
    patch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    patch.setenv('DSR_STEPS', '2')
    resources = {'metadata': {'path': str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  return folder, notebook


def test_it_draws_scores_reinforces_and_compares(ran):
  folder, notebook = ran
  assert (folder / 'runs' / 'quickstart' / 'report.html').is_file()
  said = '\n'.join(
    output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', [])
  )
  for words in ('candidate', 'the worst: R_G', 'R_U', 'before', 'after', 'nats a token'):
    assert words in said
  pictures = [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if 'image/png' in output.get('data', {})
  ]
  assert len(pictures) == 3


def test_what_is_shown_in_the_file_has_no_error_and_no_path_of_a_machine():
  text = NOTEBOOK.read_text()
  assert '"output_type": "error"' not in text
  assert '/home/' not in text and '/root/' not in text and '/tmp/' not in text
