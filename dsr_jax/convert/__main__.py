"""Converts a model to a directory in the Hugging Face layout or in the original layout, or a run's
adapters to a peft directory.

  python -m dsr_jax.convert --source=deepseek-ai/Janus-Pro-1B --target=janus_pro_1b --format=hf
  python -m dsr_jax.convert --source=runs/scenes@80 --target=reinforced --format=hf
  python -m dsr_jax.convert --source=runs/lora --target=adapter --format=peft
  python -m dsr_jax.convert --source=runs/scenes --target=out --format=hf --push_to_hub=USER/NAME

The source is a model directory in either layout (.safetensors or .bin), a Hub id, 'scenes', or a
run's workdir. Unless you set --dtype, weights keep their dtype, and the trained weights of a run
are float32. For a run that trained adapters, hf and deepseek merge them, and peft has only the
adapters. Prints a JSON object about the target.
"""

import pathlib

from absl import flags

from dsr_jax import cli, families, flag_types, saved_config
from dsr_jax import convert as convert_lib
from dsr_jax.convert import adapter, card, hub, locate, overlay, table
from dsr_jax.errors import InputError

FORMATS = ('hf', 'deepseek', 'showo', 'peft')


def convert(
  source: str,
  target: str,
  layout: str,
  *,
  dtype: str | None = None,
  overwrite: bool = False,
  base: str = '',
  push_to_hub: str = '',
):
  """Converts a model. Returns the object that the command prints. InputError for every error that a
  user can fix.

  base: see `locate.locate`. push_to_hub: OWNER/NAME of the repository to upload the target to.
  """
  convert_lib.check_target(target, overwrite)
  if push_to_hub:
    hub.check(push_to_hub)
  located = locate.locate(source, base)
  for path in filter(None, (located.directory, located.workdir)):
    # --overwrite would delete the source.
    if pathlib.Path(path).resolve().is_relative_to(pathlib.Path(target).resolve()):
      raise InputError(
        f'the target {target} is or contains the source {path}; name another directory in --target'
      )
  if layout == 'peft':
    done = _adapter(source, target, located, overwrite, push_to_hub)
  else:
    done = _model(source, target, layout, located, dtype, overwrite, push_to_hub)
  if push_to_hub:
    done['pushed'] = hub.push(target, push_to_hub)
  return done


def _model(source, target, layout, located, dtype, overwrite, repository):
  stored = convert_lib.open_stored(located.directory)
  family = families.family_of(stored.config)
  if (layout == 'showo') != (stored.layout == 'showo'):
    expected = 'showo' if stored.layout == 'showo' else 'hf or deepseek'
    raise InputError(
      f'--format={layout} does not fit {source}, a {family.name}; use {expected}, or peft for a '
      "run's adapters"
    )
  stored.check_finite()
  read, processor = stored.atom, stored.processor
  if located.workdir:
    processor = processor.with_template(saved_config.of_run(located.about['method'])['template'])
    locate.check_base(located, stored.checkpoint.digest())
    read = overlay.reader(stored, located.trained)
  lacking = layout == 'deepseek' and [
    n for n in table.unused(stored.config.vision, layout) if n not in stored.kept_aside
  ]
  told = card.make(located, layout, family, lacking or (), repository)
  zeros = convert_lib.export(
    target,
    layout,
    stored.config,
    processor,
    read,
    stored.directory,
    kept_aside=stored.kept_aside,
    dtype=dtype,
    guidance=located.about['method'].get('guidance') if located.about else None,
    card=told.text,
    beside=told.pictures,
    overwrite=overwrite,
  )
  if zeros:
    cli.log(
      f'written as zeros: {len(zeros)} tensors that the source does not have and no forward pass '
      f'reads ({", ".join(zeros)})'
    )
  tensors = len(table.entries(stored.abstract, layout))
  if layout == 'deepseek':
    tensors += len(table.unused(stored.config.vision, layout))
  return dict(target=target, format=layout, source=source, tensors=tensors, zeros=zeros)


def _adapter(source, target, located, overwrite, repository):
  if 'lora' not in located.trained:
    raise InputError(
      f'{source} has no adapters, which only a run with method.trainable=lora has; use --format=hf'
    )
  config, _ = convert_lib.read_config(located.directory)
  family = families.family_of(config)
  told = card.make(located, 'peft', family, repository=repository)
  adapter.save(
    target,
    located.trained['lora'],
    located.about['model']['name'],
    family,
    overwrite,
    beside={'README.md': told.text.encode(), **told.pictures},
  )
  return dict(target=target, format='peft', source=source)


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(source=f.source, target=f.target, format=f.format)
  if f.format not in FORMATS:
    raise InputError(f'--format={f.format} is unknown; choose {" or ".join(FORMATS)}')
  if f.dtype not in (None, 'float32', 'bfloat16'):
    raise InputError(f'--dtype={f.dtype} is unknown; choose float32 or bfloat16, or leave it out')
  cli.log(f'converting {f.source} to {f.target}')
  more = dict(dtype=f.dtype, overwrite=f.overwrite, base=f.base, push_to_hub=f.push_to_hub)
  done = convert(f.source, f.target, f.format, **more)
  cli.print_json(done, kept=f.target)


def define_flags(f=flags.FLAGS):
  flag_types.define_path('source', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_base_flag(f)
  flag_types.define_path(
    'target', None, 'The directory to write. It appears only when it is complete.', f
  )
  flags.DEFINE_string(
    'format',
    None,
    'hf (for transformers), deepseek (for the original Janus code), showo (for the original Show-o '
    "code), or peft (only a run's adapters).",
    flag_values=f,
  )
  flags.DEFINE_string(
    'dtype',
    None,
    'float32 or bfloat16, for all weights. By default, each weight keeps its dtype.',
    flag_values=f,
  )
  flags.DEFINE_bool('overwrite', False, 'Replace the target if it exists.', flag_values=f)
  flags.DEFINE_string(
    'push_to_hub',
    '',
    'Also upload the target to OWNER/NAME on the Hugging Face Hub; a new repository is private.',
    flag_values=f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
