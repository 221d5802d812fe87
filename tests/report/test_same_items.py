"""What a run says of itself compares the same items on both sides, whatever the lists were."""

import json

import numpy as np
import pytest
from run_command import Page
import run_pages

from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.report import before_after, page, same_items, summary
from dsr_jax.scenes import grammar, sets

WHOLE, SHORT = 6, 2  # prompts a task before and after, and during
TASKS = len(grammar.GENEVAL)


def rows_of(rng, per_task, pictures, right):
  """The rows of an evaluation; right: the share of right pictures."""
  sums = rng.integers(1, 5, (pictures, 8)).astype(float)
  return {
    'generation': (rng.random((TASKS * per_task, 4)) < right).astype(int).tolist(),
    'description': sums.tolist(),
    'description_greedy': sums.tolist(),
    'yesno': rng.integers(1, 4, (pictures // 2, 6)).astype(float).tolist(),
    'watched_generation': rng.normal(-1, 0.3, (3, 4)).tolist(),
    'watched_understanding': rng.normal(-1, 0.3, (3, 1)).tolist(),
  }


def scores_of(rows):
  """The flat scores that go with rows, as an evaluation logs them."""
  prompts = sets.evaluation_prompts(len(rows['generation']) // TASKS)
  sums, _ = scores_lib.generation_sums(prompts, np.array(rows['generation']))
  mean = scores_lib.mean_of_tasks(sums.sum(axis=0)[None])[0]
  watched = np.mean(rows['watched_generation'])
  scores = {'generation/mean': mean, 'watched/reward_generation': watched}
  scores['description/f1'] = 0.5
  scores |= {
    f'{name}{end}': value for name, value in list(scores.items()) for end in ('_low', '_high')
  }
  return scores | {'generation/strict': mean / 2}


@pytest.fixture(name='run')
def _run(tmp_path):
  """A workdir of 8 steps, evaluated at 0 on whole lists, at 4 on their beginnings, and, where it
  is finished, at 8 on whole lists again.
  """

  def make(finished):
    rng = np.random.default_rng(0)
    steps = [0, 4, *([8] if finished else [])]
    # The beginnings are easy: half of the others' share would be right.
    found = {
      s: rows_of(rng, WHOLE if s in (0, 8) else SHORT, 12 if s in (0, 8) else 4, 0.5) for s in steps
    }
    easy = np.array(found[0]['generation']).reshape(TASKS, WHOLE, 4)
    easy[:, :SHORT], easy[:, SHORT:] = 1, 0
    found[0]['generation'] = easy.reshape(-1, 4).tolist()
    (tmp_path / 'evaluations').mkdir()
    lines = [
      {'step': s, 'loss': 0.5, 'generation/reward_mean': -9.0 + s} for s in range(1, steps[-1] + 1)
    ]
    for step, rows in found.items():
      (tmp_path / 'evaluations' / f'{step:06d}.json').write_text(json.dumps(rows))
      lines.append({'step': step, **{f'eval/{k}': float(v) for k, v in scores_of(rows).items()}})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    method = dict(task='unified', objective='simpo', inputs_per_step=2, group_size=2, steps=8)
    method |= dict(learning_rate=1e-5, seed=0)
    about = {'config': {'method': method}, 'about': {'model': {'name': 'm'}}, 'devices': 'd'}
    (tmp_path / 'config.json').write_text(json.dumps(about))
    return str(tmp_path), found

  return make


def mean_over(rows, per_task):
  """GenEval's mean over the first prompts of each task, by hand."""
  rows = np.array(rows['generation']).reshape(TASKS, -1, 4)[:, :per_task]
  return rows.mean(axis=(1, 2)).mean()


def compared(workdir, name):
  return next(one for one in same_items.compare(workdir, 8) if one.name == name)


def test_an_unfinished_run_is_compared_over_the_items_that_it_has_so_far(run):
  """The whole list before beside its easy beginning now once said +0.093 of nothing learned."""
  workdir, found = run(finished=False)
  one = compared(workdir, 'generation/mean')
  assert one.before == mean_over(found[0], SHORT) == 1.0  # not 1/3, which the whole list has
  assert one.after == pytest.approx(mean_over(found[4], SHORT))
  assert one.items == f'{TASKS * SHORT} prompts' and one.step == 4
  assert one.low <= one.change <= one.high < 0
  text = ' '.join(Page(open(page.write(workdir), encoding='utf-8').read()).words)
  assert f'{one.change:.3f}' in text.replace('−', '-') and '1.000 before' in text
  assert 'After 4 of 8 steps' in text and 'worse: Correct images' in text


def test_a_finished_run_is_compared_over_the_whole_lists(run):
  workdir, found = run(finished=True)
  one = compared(workdir, 'generation/mean')
  assert one.before == pytest.approx(mean_over(found[0], WHOLE))
  assert one.after == pytest.approx(mean_over(found[8], WHOLE))
  assert one.items == f'{TASKS * WHOLE} prompts'
  task = compared_rows(found, grammar.GENEVAL[2])
  points, counted = same_items.curve(
    same_items.evaluations(workdir), f'generation/{grammar.GENEVAL[2]}'
  )
  assert [p.value for p in points] == pytest.approx(task) and counted == f'{SHORT} prompts'


def compared_rows(found, task):
  index = grammar.GENEVAL.index(task)
  return [
    np.array(r['generation']).reshape(TASKS, -1, 4)[index, :SHORT].mean() for r in found.values()
  ]


def test_intervals_of_changes_are_paired(run):
  workdir, found = run(finished=True)
  one = compared(workdir, 'description/f1')
  first, last = (np.array(found[step]['description']) for step in (0, 8))
  expected = stats.difference(last, first, scores_lib.DESCRIPTION['f1'])
  assert (one.low, one.high) == (expected.low, expected.high)
  assert one.change == pytest.approx(expected.value) and one.items == '12 images'


def test_a_score_without_rows_is_compared_on_equal_lists_alone(run):
  assert compared(run(finished=False)[0], 'generation/strict').before is None


def test_a_score_without_rows_is_compared_where_both_lists_are_whole(run):
  assert compared(run(finished=True)[0], 'generation/strict').before is not None


def test_a_curve_goes_over_the_same_items_at_every_step(run):
  workdir, found = run(finished=True)
  points, counted = same_items.curve(same_items.evaluations(workdir), 'generation/mean')
  assert [p.step for p in points] == [0, 4, 8] and counted == f'{TASKS * SHORT} prompts'
  assert [p.value for p in points] == pytest.approx(
    [mean_over(rows, SHORT) for rows in found.values()]
  )


def test_rewards_of_changing_prompts_are_no_result(run):
  """Means of the first and the last tenth of steps once said +8.27, of one hard prompt."""
  workdir, found = run(finished=True)
  summary.write(workdir, 8, 8, 'f')
  # The last line is a path, of any name.
  rows = summary.table(workdir).splitlines()[:-1]
  assert not [row for row in rows if 'reward_mean' in row or '-9' in row]
  written = json.loads(open(f'{workdir}/summary.json', encoding='utf-8').read())
  assert 'rewards' not in written
  one = written['evaluation']['watched/reward_generation']
  assert one['before'] == pytest.approx(np.mean(found[0]['watched_generation']))
  assert one['after'] == pytest.approx(np.mean(found[8]['watched_generation']))
  assert one['items'] == '3 prompts'


def test_the_table_is_grouped_and_goes_from_gains_to_losses(run):
  workdir, _ = run(finished=True)
  summary.write(workdir, 8, 8, 'f')
  lines = summary.table(workdir).splitlines()
  heads = [line for line in lines if line and not line.startswith(' ')]
  assert heads == [
    'fixed list, rewards by the initial model',
    'drawing',
    'describing, sampled',
    f'report       {workdir}/report.html',
  ]
  assert lines[1].split()[:3] == ['before', 'after', 'change']


def test_damaged_rows_are_left_out_and_the_logged_numbers_stay(run, tmp_path):
  workdir, _ = run(finished=True)
  (tmp_path / 'evaluations' / '000008.json').write_text('{"generation": "x"}')
  one = compared(workdir, 'generation/mean')
  assert one.low is None and one.before is not None
  (tmp_path / 'evaluations' / '000008.json').write_text('{"gen')
  assert compared(workdir, 'generation/mean').low is None


def test_a_run_may_go_on_with_a_smaller_fixed_list(tmp_path):
  rng = np.random.default_rng(0)
  run_pages.watched(str(tmp_path), 0, rng, inputs=3, samples=4)
  run_pages.watched(str(tmp_path), 2, rng, inputs=2, samples=2)
  run_pages.watched(str(tmp_path), 4, rng, inputs=2, samples=2)
  uneven, even = before_after.sheet(str(tmp_path), 2), before_after.sheet(str(tmp_path), 4)
  assert uneven.size == even.size
