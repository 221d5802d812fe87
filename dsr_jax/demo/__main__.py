"""Serves an interactive page: draw with rewards, describe and ask, compare two models, inspect a
run.

  python -m dsr_jax.demo --model=scenes
  python -m dsr_jax.demo --model=runs/scenes --compare=scenes

Only this machine can open the page unless you set --host, and the page loads nothing from other
servers. Needs the extra `demo`: pip install 'dsr_jax[demo]'.
"""

import errno
import importlib
import importlib.util
import socket

from absl import flags

from dsr_jax import api, cli, flag_types
from dsr_jax.convert import locate
from dsr_jax.demo import views as views_lib
from dsr_jax.errors import InputError


def main(argv, f=flags.FLAGS):
  """Serves the page until Ctrl-C."""
  cli.no_arguments(argv)
  cli.require(model=f.model)
  cli.check_sampling(f.num_samples, 1.0, 0)
  check_gradio()
  check_port(f.host, f.port)

  model = _load(f.model, f)
  compare = _load(f.compare, f) if f.compare else None
  run = locate.run_of(f.model) or locate.run_of(f.compare or '')
  views = views_lib.Views(model, compare, run, f.num_samples)
  cli.log('compiling')
  views.warm()
  # Gradio takes seconds to import and is not part of a plain installation.
  page = importlib.import_module('dsr_jax.demo.page')
  cli.log(f'open http://{f.host}:{f.port} (Ctrl-C stops it)')
  page.launch(page.build(views), f.host, f.port)


def _load(name, f) -> api.Model:
  cli.log(f'loading {name}')
  base = locate.base_for(name, f.base, several=bool(f.compare))
  return api.load(name, template=f.template, base=base)


def check_gradio():
  """InputError unless Gradio is installed."""
  if importlib.util.find_spec('gradio') is None:
    raise InputError(
      "gradio is not installed; pip install 'dsr_jax[demo]', or in a clone pip install -r "
      'requirements-demo.txt'
    )


def check_port(host: str, port: int):
  """InputError unless a server can listen there."""
  if not 0 < port < 2**16:
    raise InputError(f'--port is {port}; choose a number from 1 to 65535')
  try:
    with socket.socket() as tried:
      tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      tried.bind((host, port))
  except OSError as e:
    what = 'taken' if e.errno == errno.EADDRINUSE else f'not available ({e.strerror})'
    raise InputError(f'port {port} of {host} is {what}; choose another --port or --host') from e


def define_flags(f=flags.FLAGS):
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_flags(f)
  flag_types.define_path('compare', None, 'A second model, which samples with the same seeds.', f)
  flags.DEFINE_integer('num_samples', 8, 'Number of images or texts per click.', flag_values=f)
  flags.DEFINE_string(
    'host', '127.0.0.1', 'Address to listen on; 0.0.0.0 is open to the network.', flag_values=f
  )
  flags.DEFINE_integer('port', 7860, 'Port to listen on.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
