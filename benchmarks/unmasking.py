"""Times drawing by unmasking: the small Show-o against a plain torch version of the same loop.

  python -m benchmarks.unmasking [--inputs=16] [--group=8] [--rounds=5]

The small Show-o of Scenes with random weights, prompts of 24 tokens in 48 positions, 32 guided
steps. The torch version uses transformers' Phi as the original does: whole rows, padded on the
left, prompt and image at every step, conditional and unconditional rows in one batch, without
gradients. Both use all cores of the CPU and take turns after a warm-up round. The results are
medians of wall-clock seconds and of CPU seconds, which do not depend on other load. Prints a JSON
object.
"""

import dataclasses
import json
import math
import statistics
import time

from absl import flags
from flax import nnx
import jax
import numpy as np
import torch

from benchmarks import torch_phi
from dsr_jax import cli
from dsr_jax.convert import table
from dsr_jax.models.showo import maskgit
from dsr_jax.models.showo import model as showo
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.models.unified import Sampling, Text, row_keys

WORDS, PLACES, GUIDANCE = 24, 48, 2.0


def ours(config, params):
  """Function (prompt ids (B, T), mask (B, T), keys (B, G)) -> codes (B, G, N)."""
  graphdef = showo.graphdef_of(config)
  how = Sampling(guidance=GUIDANCE)
  run = jax.jit(
    lambda params, ids, mask, keys: nnx.merge(graphdef, params).sample_pictures(
      Text(ids, mask), keys, how
    )[0]
  )
  return lambda ids, mask, keys: np.asarray(run(params, ids, mask, keys))


def theirs(config, params):
  """Function (prompt ids (B, T) of WORDS words, group) -> codes (B, G, N), in plain torch."""
  text, t = config.text, config.templates
  phi = torch_phi.language_model(
    rows=config.rows,
    width=text.hidden_size,
    inner=text.intermediate_size,
    layers=text.num_hidden_layers,
    heads=text.num_attention_heads,
  )
  own = {name: part for name, part in params.items() if name != 'vqmodel'}
  leaves = jax.tree.leaves(own)
  phi.load_state_dict(
    {
      e.name.removeprefix('showo.'): torch.from_numpy(
        np.array(e.atoms[0].of_leaf(np.asarray(leaves[e.atoms[0].leaf])))
      )
      for e in table.entries(own, 'showo')
    }
  )
  total, first, mask_id = config.num_codes, config.first_code, config.mask_id
  steps = config.sampling_steps
  plan = maskgit.schedule(total, steps, config.sampling_noise)

  def rows(contents):
    """Prompts -> left-padded ids (R, P + N + 2) with all codes masked, and the attention mask."""
    whole, seen = [], []
    longest = 3 + PLACES
    for content in contents:
      head = [*t.generation_prefix, *content, *t.generation_suffix[:-1]]
      pads = longest - len(head)
      ids = [t.pad_id] * pads + head + [t.soi_id] + [mask_id] * total + [t.eoi_id]
      place = torch.arange(len(ids))
      visible = (place[:, None] >= place) | (place[:, None] >= longest)
      visible &= (place >= pads) | (place[:, None] == place)
      whole.append(ids)
      seen.append(visible)
    return torch.tensor(whole), torch.stack(seen)[:, None]

  @torch.no_grad()
  def run(prompts, group):
    contents = [p for p in prompts for _ in range(group)]
    cond, seen = rows(contents)
    uncond, seen_too = rows([[]] * len(contents))
    ids, visible = torch.cat([cond, uncond]), torch.cat([seen, seen_too])
    known = torch.zeros(len(contents), total, dtype=torch.bool)
    codes = torch.zeros(len(contents), total, dtype=torch.long)
    start = ids.shape[1] - total - 1
    for step in range(steps):
      now = torch.where(known, codes + first, mask_id)
      ids[:, start:-1] = torch.cat([now, now])
      hidden = phi.model(input_ids=ids, attention_mask=visible).last_hidden_state[:, start:-1]
      head = phi.lm_head
      logits = torch.nn.functional.linear(
        hidden, head.weight[first:mask_id], head.bias[first:mask_id]
      )
      c, u = logits.chunk(2)
      p = torch.softmax(u + GUIDANCE * (c - u), -1)
      drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1).reshape(known.shape)
      codes = torch.where(known, codes, drawn)
      picked = p.gather(-1, codes[..., None])[..., 0].clamp(1e-20).log()
      noise = -torch.log(-torch.log(torch.rand(known.shape).clamp(1e-20)).clamp(1e-20))
      sure = torch.where(known, math.inf, picked + float(plan.noise[step]) * noise)
      again = torch.zeros_like(known).scatter(1, sure.argsort(-1)[:, : plan.masked[step]], True)
      known = known | ~again
    return codes.reshape(len(prompts), group, total).numpy()

  return run


def main(argv, f=flags.FLAGS):
  """Prints the times, as JSON."""
  cli.no_arguments(argv)
  config = ShowoConfig.scenes(500)
  config = dataclasses.replace(config, templates=SHOWO.stand_in(config))
  params = showo.create(config)[1]
  rng = np.random.default_rng(0)
  prompts = rng.integers(9, 499, (f.inputs, WORDS)).astype(np.int32)
  ids = np.pad(prompts, ((0, 0), (0, PLACES - WORDS)))
  mask = np.arange(PLACES) < np.full((f.inputs, 1), WORDS)
  keys = row_keys(jax.random.key(0), 0, f.inputs, f.group)
  here, there = ours(config, params), theirs(config, params)

  turns = {'here': lambda: here(ids, mask, keys), 'torch': lambda: there(prompts, f.group)}
  clocks = {'seconds': time.perf_counter, 'core_seconds': time.process_time}
  taken = {clock: {name: [] for name in turns} for clock in clocks}
  for turn in range(f.rounds + 1):
    for name, run in turns.items():
      began = {clock: now() for clock, now in clocks.items()}
      codes = run()
      assert codes.shape == (f.inputs, f.group, config.num_codes)
      for clock, now in clocks.items():
        if turn:
          taken[clock][name].append(now() - began[clock])
  found = dict(pictures=f.inputs * f.group, threads=torch.get_num_threads())
  for clock, by_name in taken.items():
    medians = {name: statistics.median(times) for name, times in by_name.items()}
    found[clock] = {name: round(value, 3) for name, value in medians.items()}
    found[clock]['times_as_fast'] = round(medians['torch'] / medians['here'], 2)
  print(json.dumps(found, indent=2))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('inputs', 16, 'Prompts.', flag_values=f)
  flags.DEFINE_integer('group', 8, 'Images per prompt.', flag_values=f)
  flags.DEFINE_integer('rounds', 5, 'Number of timed rounds.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
