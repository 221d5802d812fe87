"""Code that the commands share: start and exit, parsing and checking of flags, and output.

Every command module has `define_flags(f)`, which adds its flags to an absl `FlagValues`, and
`main(argv, f)`, which reads them from it; importing a command defines no flags. Its last line is
`cli.run_main(main, define_flags)`.
"""

import difflib
import json
import re
import sys

from absl import flags, logging

from dsr_jax import environment, inputs
from dsr_jax.errors import InputError

_HELP = ('help', 'h', 'helpshort', 'helpfull', '?')
# absl's names of flag types -> plain words.
_KINDS = {'int': 'a whole number', 'float': 'a number', 'bool': 'true or false'}

# Start and exit.


def run_main(main, define_flags):
  """Runs a command and ends the process.

  Exit status: 0, or what main returns; 2 with one line on stderr for problems that a user can fix
  (bad input, a full disk, too little memory); 130 after Ctrl-C. If the reader of the output has
  left, as `| head` does, it ends silently.

  Args:
    main: (argv, f) -> exit status or None.
    define_flags: (f), adds the command's flags.
  """
  environment.end_imports()
  environment.watch_interrupts()
  try:
    status = _guarded(main, define_flags)
  except KeyboardInterrupt:
    environment.end_by_interrupt()
  environment.flush()
  environment.end(status)


def _guarded(main, define_flags):
  """`run_main`'s exit status."""
  try:
    environment.prepare(sys.argv[1:])
    define_flags(flags.FLAGS)
    asked = _help_asked(sys.argv[1:], flags.FLAGS)
    if asked:
      print_text(help_text(sys.modules['__main__'].__doc__, flags.FLAGS, full=asked == 'helpfull'))
      return 0
    argv = parse(flags.FLAGS, sys.argv)
    # Orbax logs a dozen lines per checkpoint, and warns about read-only folders.
    logging.set_verbosity(logging.ERROR)
    return main(argv, flags.FLAGS) or 0
  except InputError as e:
    environment.tell(str(e))
    return 2
  except BrokenPipeError:
    return environment.PIPE_STATUS
  except Exception as e:
    said = environment.sentence(e)
    if said is None:
      raise
    environment.tell(said)
    return 2


# Flags.


def parse(f, argv) -> list[str]:
  """Parses the flags in `argv`, whose first item is the program; returns the other arguments.

  Raises InputError for an unknown flag, a missing value, a value of the wrong type, or an error of
  a flag's own parser.
  """
  try:
    argv = f.read_flags_from_files(argv)
    _check_names(f, argv[1:])
    for name in f:
      # A config's keys become flags once it is read: so it comes first. It may have a default.
      if hasattr(f[name].parser, 'arrange'):
        argv = [argv[0], *f[name].parser.arrange(argv[1:])]
    sys.argv = argv  # where a config's keys are read from
    return f(argv)
  except flags.Error as e:
    raise InputError(_of_flag_error(f, str(e))) from e


def _check_names(f, arguments):
  for name, text in _named(f, arguments):
    known = name in f or name.startswith('no') and name[2:] in f and f[name[2:]].boolean
    if known or name.split('.')[0] in f or name in _HELP:
      continue
    near = difflib.get_close_matches(name, list(f), n=1, cutoff=0.6)
    hint = f'did you mean --{near[0]}?' if near else 'see --help for all flags'
    raise InputError(f'{text} is not a flag of this command; {hint}')


def _named(f, arguments):
  """(name, name as typed) of each flag, up to the first argument that is not a flag."""
  words = iter(arguments)
  for word in words:
    if word == '--' or not word.startswith('-') or word == '-':
      return
    name, equals, _ = word.lstrip('-').partition('=')
    yield name, word.partition('=')[0]
    if not equals and name in f and not f[name].boolean:
      next(words, None)  # its value


def _of_flag_error(f, text: str) -> str:
  """Our sentence for an error of absl."""
  missing = re.match(r'Missing value for flag -*(\S+)', text)
  if missing:
    return f'--{missing[1]} has no value; write --{missing[1]}=...'
  wrong = re.match(r'flag --([\w.]+)=(.*?): ', text, re.DOTALL)
  if not wrong or wrong[1] not in f:
    return f'the flags cannot be parsed ({text}); write them as --name=value, or see --help'
  flag = f[wrong[1]]
  choices = getattr(flag.parser, 'enum_values', None)
  if choices:
    return f'--{flag.name}={wrong[2]} should be one of {", ".join(choices)}; choose one of them'
  kind = flag.parser.syntactic_help or _KINDS.get(flag.flag_type(), f'a {flag.flag_type()}')
  kind = {'an integer': 'a whole number'}.get(kind, kind)
  return f'--{flag.name}={wrong[2]} should be {kind}; change it'


def _help_asked(arguments, f) -> str:
  """The name of the help flag that was given, or ''."""
  names = [name for name, _ in _named(f, arguments)]
  return next((name for name in names if name in _HELP), '')


def help_text(about, f, full=False) -> str:
  """A command's description, its flags, and the keys of its config."""
  parts = [(about or '').strip(), f.get_help() if full else f.module_help(sys.argv[0])]
  parts += [f[name].parser.help() for name in f if hasattr(f[name].parser, 'arrange')]
  return '\n\n'.join(part.strip('\n') for part in parts if part)


def no_arguments(argv):
  """InputError for arguments on the command line that are not flags."""
  if len(argv) > 1:
    raise InputError(
      f'unexpected argument {argv[1]!r}: this command takes flags only; write --name=value, in '
      'quotes if it has spaces'
    )


def require(**values):
  """InputError for the first of the named flags that is empty."""
  for name, value in values.items():
    if value is None or value == '' or value == []:
      raise InputError(f'--{name} is missing; add --{name}=..., or see --help')


def check_range(low: int, high: int, **values):
  """InputError for the first of the named flags that is not from `low` to `high`."""
  for name, value in values.items():
    if not low <= value <= high:
      raise InputError(f'--{name} is {value}; set it to a number from {low} to {high}')


def check_sampling(
  num_samples: int, temperature: float, seed: int, cfg_weight: float | None = None
):
  """InputError for numbers that no model can sample with."""
  inputs.check_sampling(num_samples, temperature, seed, cfg_weight, dashes='--')


# Output.


def log(message: str):
  """Prints progress on stderr, for people."""
  print(message, file=sys.stderr, flush=True)


def print_text(text: str, kept: str = ''):
  """Prints the result on stdout, for machines.

  kept: where else the result was saved, such as an output folder; if there is one, a stdout that
    cannot be written is only reported and is not an error.
  """
  try:
    print(text, flush=True)
  except BrokenPipeError:  # the reader has read all it wanted
    environment.drop(sys.stdout)
  except OSError as e:
    environment.drop(sys.stdout)
    if not kept:
      raise InputError(
        f'cannot write the result to stdout ({e.strerror}); send it elsewhere'
      ) from e
    log(f'note         stdout could not be written ({e.strerror}); the result is in {kept}')


def print_json(value, kept: str = ''):
  r"""`print_text` of a JSON value. Bytes of a path that are not UTF-8 become JSON's \udcXX, and
  characters that the terminal cannot show become \uXXXX.
  """
  text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
  text = text.encode('utf-8', 'backslashreplace').decode('utf-8')
  try:
    text.encode(sys.stdout.encoding or 'utf-8')
  except UnicodeEncodeError:
    text = json.dumps(value, indent=2, allow_nan=False)
  print_text(text, kept)


def rounded(values) -> list[float]:
  """float32 values as the shortest JSON numbers that read back as the same float32."""
  return [float(str(value)) for value in values]
