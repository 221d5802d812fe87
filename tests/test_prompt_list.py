"""Many prompts of a file: refused before any work, or drawn whole, whatever kills it."""

import dataclasses
import errno
import functools
import json
import os

import micro_parts
import pytest
from run_command import Page, run

from dsr_jax import generate
from dsr_jax.errors import InputError
from dsr_jax.evaluate.answering import subject

LINES = ['a red disc', 'two green rings', 'a <script>alert(1)</script> sign', 'one blue square']
SAMPLES = 3


def load(name, wishes, mesh, drawn=None):
  """A `Subject` of the micro model."""
  model = micro_parts.load(name)
  how = micro_parts.how(wishes)
  made = subject.Subject(name, model, how, {'name': name, 'weights': 'f' * 64}, 2, mesh)
  draw = made.draw

  def counted(prompt, words, group):
    drawn.append(tuple(words))
    return draw(prompt, words, group)

  made.draw = draw if drawn is None else counted
  return made


@pytest.fixture(name='drawn')
def _drawn(monkeypatch):
  """What the model is made to draw, a chunk each."""
  found = []
  monkeypatch.setattr(subject, 'load', functools.partial(load, drawn=found))
  return found


def write(folder, lines=LINES, name='prompts.txt'):
  path = folder / name
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def flags(tmp_path, **changes):
  given = dict(model='micro', prompts=str(tmp_path / 'prompts.txt'), num_samples=SAMPLES)
  return given | dict(output=str(tmp_path / 'out')) | changes


def contents(folder):
  return {
    os.path.relpath(os.path.join(at, name), folder): open(os.path.join(at, name), 'rb').read()
    for at, _, names in os.walk(folder)
    for name in names
  }


def test_every_prompt_has_its_pictures_a_table_and_a_page(tmp_path, drawn):
  write(tmp_path)
  said = run(generate, **flags(tmp_path))
  out = tmp_path / 'out'
  assert said == {'output': str(out), 'prompts': 4, 'page': str(out / 'index.html')}
  table = json.loads((out / 'samples.json').read_text())['prompts']
  assert [one['prompt'] for one in table] == LINES
  for one in table:
    rewards = [picture['reward_generation'] for picture in one['pictures']]
    assert len(rewards) == SAMPLES and rewards == sorted(rewards, reverse=True)
    assert all((out / picture['file']).is_file() for picture in one['pictures'])
  page = Page((out / 'index.html').read_text())
  assert 'alert(1)' in ' '.join(page.words) and '<script' not in (out / 'index.html').read_text()
  manifest = json.loads((out / 'manifest.json').read_text())
  assert manifest['settings']['seed'] == 42 and manifest['settings']['samples'] == SAMPLES
  assert manifest['benchmark']['rules'].startswith('4 prompts, SHA-256 ')


def test_a_killed_command_goes_on_and_leaves_the_same_bytes(tmp_path, drawn, monkeypatch):
  write(tmp_path)
  run(generate, **flags(tmp_path, output=str(tmp_path / 'whole')))
  wanted, chunks = contents(tmp_path / 'whole'), list(drawn)
  drawn.clear()
  real, writes = os.replace, 0
  for stop in (2, 3, 9, 4):  # a few writes further each time
    writes = 0

    def fails(old, new, stop=stop):
      nonlocal writes
      writes += 1
      if writes == stop:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      real(old, new)

    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises((InputError, OSError)):
      run(generate, **flags(tmp_path))
    monkeypatch.setattr(os, 'replace', real)
  run(generate, **flags(tmp_path))
  assert contents(tmp_path / 'out') == wanted
  drawn.clear()
  run(generate, **flags(tmp_path))
  assert not drawn and contents(tmp_path / 'out') == wanted  # what is there is not drawn again
  assert len(chunks) == len(set(chunks)) == 4


def test_another_manifest_is_refused_and_the_difference_named(tmp_path, drawn):
  write(tmp_path)
  run(generate, **flags(tmp_path))
  before = contents(tmp_path / 'out')
  with pytest.raises(InputError, match='settings.seed: 42 there, 7 now'):
    run(generate, **flags(tmp_path, seed=7))
  write(tmp_path, LINES[:3])
  with pytest.raises(InputError, match=r'benchmark.rules: 4 prompts, .* there, 3 prompts, .* now'):
    run(generate, **flags(tmp_path))
  assert contents(tmp_path / 'out') == before
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'mine.doc').write_text('x')
  with pytest.raises(InputError, match=r'other contains files but no manifest.json'):
    run(generate, **flags(tmp_path, output=str(tmp_path / 'other')))


def test_ids_and_seeds_stand_in_the_names_of_folders(tmp_path, drawn):
  lines = ['{"prompt": "a", "id": "cat", "seed": 3}', '{"prompt": "a", "id": "cat", "seed": 4}']
  path = write(tmp_path, lines, 'p.jsonl')
  run(generate, **flags(tmp_path, prompts=path, num_samples=1))
  pictures = [(tmp_path / 'out' / f'cat@{seed}' / '00.png').read_bytes() for seed in (3, 4)]
  assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
  'lines, said',
  [
    (['{"prompt": "a"}', '{"prompt": '], 'line 2 of p.jsonl is not JSON'),
    ([], 'p.jsonl has no prompt; write at least one line'),
    (
      ['{"prompt": "a", "id": "x"}', '{"prompt": "b", "id": "X"}'],
      "line 1 of p.jsonl and line 2 of p.jsonl have the same id 'x'",
    ),
    (['{"prompt": "a", "id": "../x"}'], "line 1 of p.jsonl has the id '../x', .*; use at most 100"),
    (['{"prompt": "a", "seed": -1}'], "line 1 of p.jsonl has the seed '-1'"),
    (['{"prompt": "a", "num_samples": 3}'], 'line 1 of p.jsonl has its own num_samples; remove it'),
  ],
)
def test_bad_files_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, lines, said):
  monkeypatch.setattr(subject, 'load', None)
  path = write(tmp_path, lines, 'p.jsonl')
  with pytest.raises(InputError, match=said):
    run(generate, **flags(tmp_path, prompts=path))
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'changes, said',
  [
    (dict(prompt='a'), '--prompt and --prompts are both set'),
    (dict(compare='scenes'), '--compare does not work with --prompts'),
    (dict(prompts='nowhere.txt'), 'cannot read nowhere.txt'),
  ],
)
def test_flags_that_do_not_go_together_are_one_sentence(tmp_path, changes, said):
  write(tmp_path)
  with pytest.raises(InputError, match=said):
    run(generate, **flags(tmp_path, **changes))


def test_a_prompt_that_the_model_has_no_room_for_is_named_by_its_line(tmp_path, monkeypatch):
  def short(name, wishes, mesh):
    made = load(name, wishes, mesh)
    made.model.family = dataclasses.replace(made.model.family, room=lambda config: 3)
    return made

  monkeypatch.setattr(subject, 'load', short)
  write(tmp_path, ['a b', '', 'a b c d'])
  with pytest.raises(InputError, match='line 3 of prompts.txt has 4 tokens, .* at most 3; shorten'):
    run(generate, **flags(tmp_path))
