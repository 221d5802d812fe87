"""What surrounds a command: its streams, its locale and folder, and what libraries say where the
machine refuses. One sentence each, at the start where it can be known by then.

It imports no library, so that it is there before one of them fails.
"""

from collections.abc import Callable
import contextlib
import ctypes
import errno
import os
import re
import select
import signal
import sys
import threading
import time

from dsr_jax.errors import InputError, first_line

# A process that was ended by this signal has 128 more as its status, as shells have it.
PIPE_STATUS = 128 + signal.SIGPIPE
_ENDING = threading.Lock()  # held from when this process says that a signal ends it
_LEFT_AT_WORK = threading.Event()  # set when a signal has raised an exception

# Before any work.


def prepare(arguments):
  """Looks at the streams, the current folder and the locale.

  arguments: of the command line. Errors: InputError for what no command could work with.
  """
  if sys.stderr is None:  # else what is meant for it would go to stdout
    sys.stderr = open(os.devnull, 'w', encoding='utf-8')
  if sys.stdout is None:
    raise InputError(
      'found stdout closed; expected a place for the result; leave out >&-, or write >/dev/null'
    )
  # A text in letters that the terminal does not have is shown with \u.... in their place.
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  try:
    os.getcwd()
  except OSError as e:
    raise InputError(
      f'found no current folder ({e.strerror}); expected one that exists; change to another'
    ) from e
  sys.stderr = _Progress(sys.stderr)
  encoding = sys.getfilesystemencoding()
  if encoding != 'utf-8' and not all(argument.isascii() for argument in arguments):
    raise InputError(
      f'found the encoding {encoding} for the command line, which has letters beyond ASCII; '
      'expected UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1'
    )


class _Progress:
  """stderr. That it has no room is no reason to stop; that its reader has left is one."""

  def __init__(self, stream):
    self._stream = stream

  def write(self, text):
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      raise
    except OSError:
      drop(self._stream)
      return len(text)

  def __getattr__(self, name):
    return getattr(self._stream, name)


# What is raised later.


def sentence(error: BaseException) -> str | None:
  """What an error that some library raised says of the machine; None if it says nothing of it."""
  if isinstance(error, OSError):
    return _of_os_error(error)
  text = first_line(error)
  if isinstance(error, MemoryError):
    return 'found no memory left on this machine; expected more; ask for less at once'
  if _while_devices_were_looked_for(error):
    told = os.environ.get('JAX_PLATFORMS')
    where = f'JAX_PLATFORMS={told}' if told else 'the installed JAX'
    return (
      f'found no device for {where} ({text}); expected a platform of this machine; set '
      'JAX_PLATFORMS=cpu, or install JAX for the accelerator'
    )
  if 'RESOURCE_EXHAUSTED' in text:
    return (
      f'found no memory left on a device ({text}); expected more; ask for less at once, or '
      'split the model over more devices'
    )
  return None


def _while_devices_were_looked_for(error) -> bool:
  """JAX raises errors of several types there, some without words."""
  frame = error.__traceback__
  while frame is not None:
    code = frame.tb_frame.f_code
    if code.co_name == 'backends' and code.co_filename.endswith('xla_bridge.py'):
      return True
    frame = frame.tb_next
  return False


def _of_os_error(error: OSError) -> str:
  where = f' {os.fsdecode(error.filename)}' if error.filename else ''
  reason = error.strerror or first_line(error)
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return (
      f'cannot write{where} ({reason}); expected room on its disk; free some and run the same '
      'command again'
    )
  if error.errno in (errno.EMFILE, errno.ENFILE):
    return (
      f'cannot open{where} ({reason}); expected a higher limit of open files; raise it with '
      'ulimit -n 4096'
    )
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    return (
      f'cannot open{where} ({reason}); expected leave to read and write it; mend its permissions, '
      'or name another'
    )
  return f'cannot use{where} ({reason}); expected files that can be read and written; check it'


def of_variable(error: BaseException) -> str | None:
  """What an error says of an environment variable that a library reads while it is imported."""
  text = first_line(error)
  for name in re.findall(r'\b(?:JAX|XLA|TF|CUDA|NUMPY)_\w+', text.upper()):
    if name in os.environ:
      return (
        f'found {name}={os.environ[name]!r} in the environment ({text}); expected a value '
        'that it knows; change it or unset it'
      )
  return None


# The end.


def tell(message: str):
  """One line on stderr, if stderr takes it."""
  line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message)
  with contextlib.suppress(OSError):
    print(f'error: {line}', file=sys.stderr, flush=True)


def end_by_interrupt():
  """Ends this process as Ctrl-C ends others: a shell's loop around it ends too."""
  end_by_signal(signal.SIGINT)


def end_by_signal(number: int):
  """Ends this process as a signal does that nobody handles, from any of its threads."""
  said = 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name
  if _ENDING.acquire(blocking=False):  # two threads may come here for one signal
    with contextlib.suppress(OSError, RuntimeError):  # it may come while another line is written
      print(f'stopped      by {said}', file=sys.stderr, flush=True)
  else:
    time.sleep(1)  # the other one is saying so
  # Python's own `signal.signal` is for the main thread alone.
  to_default = ctypes.CDLL(None).signal
  to_default.argtypes, to_default.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  to_default(number, None)
  os.kill(os.getpid(), number)


def end(status: int):
  """Ends this process with a status. After a signal that left something at work, without what
  Python does at its end: devices may still compute, and their library would crash.
  """
  if _LEFT_AT_WORK.is_set():
    os._exit(status)
  sys.exit(status)


def leave_at_work():
  """Called where a signal is about to raise an exception in the midst of anything."""
  _LEFT_AT_WORK.set()


def flush():
  """Writes what is still held back, and lets no stream fail after this."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      drop(stream)


def drop(stream):
  """Nothing more is written to a stream that nobody reads or that has no room: not even by Python
  when it ends, which would be a traceback.
  """
  with contextlib.suppress(OSError, ValueError, AttributeError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# Python runs handlers of signals when its main thread comes back to it: while that compiles or
# waits for a device, minutes may pass.

PATIENCE_SECONDS = 5.0
_SAME_SIGNAL_SECONDS = 2.0  # the main thread may have its turn before the thread that watches


class SignalWatch:
  """While it is entered, a thread hears of signals at once and ends the process if it must.

  heard: (number) -> seconds that the main thread may take to come back to Python, where its handler
  calls `came_back`; 0: none, whether it has come back or not; None: as long as it likes. Called in
  that thread, for each signal that has a handler in Python.
  """

  def __init__(self, heard: Callable[[int], float | None]):
    self._heard = heard
    self._back = 0.0

  def __enter__(self):
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    threading.Thread(target=self._watch, daemon=True, name='signals').start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._before)
    os.close(self._write)  # ends the thread

  def came_back(self):
    """The main thread's handler runs: it does what is to be done."""
    self._back = time.monotonic()

  def _watch(self):
    since, seconds, number = 0.0, None, 0
    while True:
      left = None if seconds is None else max(0.0, since + seconds - time.monotonic())
      if select.select([self._read], [], [], left)[0]:
        told = os.read(self._read, 1)
        if not told:
          os.close(self._read)
          return
        since, number = time.monotonic(), told[0]
        seconds = self._heard(number)
      elif seconds == 0 or self._back < since - _SAME_SIGNAL_SECONDS:
        end_by_signal(number)
      else:
        seconds = None


def watch_interrupts():
  """From here on the first Ctrl-C is a KeyboardInterrupt, or the end if the main thread does not
  come back to Python for `PATIENCE_SECONDS`; the second one is the end.
  """
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup may ignore it
    return
  times = []

  def heard(number):
    if number != signal.SIGINT:
      return None
    times.append(number)
    return PATIENCE_SECONDS if len(times) == 1 else 0.0

  def interrupted(number, frame):
    del number, frame
    watch.came_back()
    leave_at_work()
    raise KeyboardInterrupt

  watch = SignalWatch(heard).__enter__()
  signal.signal(signal.SIGINT, interrupted)


# Importing takes seconds, and may be interrupted or meet a variable that a library does not
# understand; what a collection of garbage calls loses what is raised in it.


def begin_imports():
  """Until `cli.run_main` begins."""
  sys.excepthook = _while_imported
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup may ignore it
    signal.signal(signal.SIGINT, _interrupted_while_imported)


def end_imports():
  """Errors and Ctrl-C are again what they are elsewhere, but that no Ctrl-C is lost."""
  sys.excepthook = sys.__excepthook__
  sys.unraisablehook = _unraisable
  if signal.getsignal(signal.SIGINT) is _interrupted_while_imported:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted_while_imported(number, frame):
  del number, frame
  end_by_interrupt()


def _unraisable(unraisable):
  if issubclass(unraisable.exc_type, KeyboardInterrupt):
    end_by_interrupt()
  sys.__unraisablehook__(unraisable)


def _while_imported(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    end_by_interrupt()
  said = sentence(error) or of_variable(error)
  if said is None:
    sys.__excepthook__(kind, error, trace)
    return
  tell(said)
  os._exit(2)  # after this function Python would end with 1
