"""The environment of a command: its streams, locale, current folder and signals, and sentences for
the errors that libraries raise about the machine. Checks run at the start where possible.

This module imports no library, so it works even if importing one fails.
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

# The status of a process that this signal ended: 128 more, by the convention of shells.
PIPE_STATUS = 128 + signal.SIGPIPE
_ENDING = threading.Lock()  # held once this process reports that a signal ends it
_LEFT_AT_WORK = threading.Event()  # set when a signal raises an exception

# Before any work.


def prepare(arguments):
  """Checks the streams, the current folder and the locale.

  arguments: of the command line. Raises InputError for problems that would stop any command.
  """
  if sys.stderr is None:  # otherwise its output would go to stdout
    sys.stderr = open(os.devnull, 'w', encoding='utf-8')
  if sys.stdout is None:
    raise InputError(
      'stdout is closed, so there is no place for the result; leave out >&-, or write >/dev/null'
    )
  # Characters that the terminal cannot show are written as \uXXXX.
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  try:
    os.getcwd()
  except OSError as e:
    raise InputError(
      f'the current folder does not exist ({e.strerror}); change to another folder'
    ) from e
  sys.stderr = _Progress(sys.stderr)
  encoding = sys.getfilesystemencoding()
  if encoding != 'utf-8' and not all(argument.isascii() for argument in arguments):
    raise InputError(
      f'the command line has characters beyond ASCII, but its encoding is {encoding}, not UTF-8; '
      'set LC_ALL=C.UTF-8 or PYTHONUTF8=1'
    )


class _Progress:
  """stderr. A full disk does not stop the command; a reader that has left does."""

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


# Errors raised later.


def sentence(error: BaseException) -> str | None:
  """The sentence for a library's error that is about the machine; None for other errors."""
  if isinstance(error, OSError):
    return _of_os_error(error)
  text = first_line(error)
  if isinstance(error, MemoryError):
    return 'this machine has no memory left; ask for less at once'
  if _while_devices_were_looked_for(error):
    told = os.environ.get('JAX_PLATFORMS')
    where = f'JAX_PLATFORMS={told}' if told else 'the installed JAX'
    return (
      f'there is no device for {where} ({text}); set JAX_PLATFORMS to a platform of this machine, '
      'such as cpu, or install JAX for the accelerator'
    )
  if 'RESOURCE_EXHAUSTED' in text:
    return (
      f'a device has no memory left ({text}); ask for less at once, or split the model over more '
      'devices'
    )
  return None


def _while_devices_were_looked_for(error) -> bool:
  """JAX raises errors of several types there, some without a message."""
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
      f'cannot write{where} ({reason}); free some space on its disk and run the same command again'
    )
  if error.errno in (errno.EMFILE, errno.ENFILE):
    return f'cannot open{where} ({reason}); raise the limit of open files with ulimit -n 4096'
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    return (
      f'cannot open{where} ({reason}), which must be readable and writable; fix its permissions, '
      'or name another'
    )
  return f'cannot use{where} ({reason}); check that it can be read and written'


def of_variable(error: BaseException) -> str | None:
  """The sentence for an error about an environment variable that a library reads on import."""
  text = first_line(error)
  for name in re.findall(r'\b(?:JAX|XLA|TF|CUDA|NUMPY)_\w+', text.upper()):
    if name in os.environ:
      return (
        f'the environment variable {name} has the unknown value {os.environ[name]!r} ({text}); '
        'change it or unset it'
      )
  return None


# The end.


def tell(message: str):
  """Prints an error as one line on stderr, if stderr can be written."""
  line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message)
  with contextlib.suppress(OSError):
    print(f'error: {line}', file=sys.stderr, flush=True)


def end_by_interrupt():
  """Ends this process by the signal of Ctrl-C, so that a shell loop around it ends too."""
  end_by_signal(signal.SIGINT)


def end_by_signal(number: int):
  """Ends this process as an unhandled signal would; can be called from any thread."""
  said = 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name
  if _ENDING.acquire(blocking=False):  # two threads may get here for one signal
    with contextlib.suppress(OSError, RuntimeError):  # another line may be half written
      print(f'stopped      by {said}', file=sys.stderr, flush=True)
  else:
    time.sleep(1)  # the other thread is printing it
  # Python's own `signal.signal` works only in the main thread.
  to_default = ctypes.CDLL(None).signal
  to_default.argtypes, to_default.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  to_default(number, None)
  os.kill(os.getpid(), number)


def end(status: int):
  """Ends this process with a status. Skips Python's cleanup after a signal that interrupted work:
  devices may still be computing, and their library would crash.
  """
  if _LEFT_AT_WORK.is_set():
    os._exit(status)
  sys.exit(status)


def leave_at_work():
  """Called when a signal is about to raise an exception, which may interrupt any work."""
  _LEFT_AT_WORK.set()


def flush():
  """Flushes both streams, and keeps them from failing afterwards."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      drop(stream)


def drop(stream):
  """Redirects a stream that has no reader or no room to /dev/null, so that Python's own flush at
  exit does not fail with a traceback.
  """
  with contextlib.suppress(OSError, ValueError, AttributeError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# Python runs signal handlers only when its main thread returns to Python code. While that thread
# compiles or waits for a device, this may take minutes.

PATIENCE_SECONDS = 5.0
_SAME_SIGNAL_SECONDS = 2.0  # the main thread may handle a signal before the watching thread does


class SignalWatch:
  """A context in which a thread learns of signals at once, and ends the process if necessary.

  heard: (number) -> seconds that the main thread may take to return to Python, where its handler
  calls `came_back`; 0: end the process at once, in any case; None: wait without limit. Called in
  the watching thread, for each signal that has a handler in Python.
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
    """Called by the main thread's handler, which now deals with the signal."""
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
  """From here on, the first Ctrl-C raises KeyboardInterrupt, or ends the process if the main thread
  does not return to Python within `PATIENCE_SECONDS`; the second one ends the process.
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


# Importing takes seconds; it may be interrupted, or fail at an environment variable that a library
# does not understand. Exceptions raised during garbage collection are lost.


def begin_imports():
  """Sets the handlers that apply until `cli.run_main` begins."""
  sys.excepthook = _while_imported
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup may ignore it
    signal.signal(signal.SIGINT, _interrupted_while_imported)


def end_imports():
  """Restores Python's handling of errors and Ctrl-C, except that no Ctrl-C gets lost."""
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
  os._exit(2)  # after this function, Python would exit with 1
