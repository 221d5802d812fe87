"""What a compiled program says of itself: which collectives stand in which loops, and the largest
arrays over a vocabulary.

Read from the optimised HLO's text, the same for CPU, GPU and TPU. Of what `dsr_jax.plan --hlo=FILE`
left, this prints what docs/plan.md says of loops and moves:

  python tests/support/hlo.py FILE
"""

import functools
import math
import re
import sys
from typing import NamedTuple

MOVES = (
  'all-gather',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
)  # that a decode loop should not need
SUMS = ('all-reduce', 'reduce-scatter')
BITS = {
  'pred': 8,
  's4': 4,
  'u4': 4,
  's8': 8,
  'u8': 8,
  's16': 16,
  'u16': 16,
  'bf16': 16,
  'f16': 16,
  's32': 32,
  'u32': 32,
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
}
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][a-z0-9\-]*)\(')
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:body|condition|to_apply|calls|branch_computations|called_computations|true_computation|false_computation)='
  r'(\{[^}]*\}|%?[\w.\-]+)'
)


class Instruction(NamedTuple):
  """opcode; arrays: (type, shape) of the result; called: names of computations; scope: the named
  scopes it comes from.
  """

  name: str
  opcode: str
  arrays: tuple
  called: tuple
  scope: str

  @property
  def bytes(self):
    """Of the largest array of the result: a start's result repeats its operand."""
    return max(
      (math.prod(shape) * BITS.get(kind, 32) // 8 for kind, shape in self.arrays), default=0
    )


class Program:
  """The computations of a program's text: name -> instructions."""

  def __init__(self, text: str):
    self.computations, self.entry, current = {}, None, None
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head and ' = ' not in line.split('{')[0]:
        current = self.computations.setdefault(head[2], [])
        self.entry = head[2] if head[1] else self.entry
      elif current is not None and (found := _LINE.match(line)):
        current.append(_instruction(*found.groups()))

  @functools.cached_property
  def instructions(self):
    """All of them."""
    return [i for body in self.computations.values() for i in body]

  def within(self, name):
    """Instructions of a computation and of all that it calls."""
    seen, waiting = set(), [name]
    while waiting:
      at = waiting.pop()
      if at not in seen and at in self.computations:
        seen.add(at)
        waiting += [c for i in self.computations[at] for c in i.called]
    return [i for at in seen for i in self.computations[at]]

  def loops(self, scope: str):
    """Outermost `while` loops whose scope has `scope` as a part: [(name, instructions within)]."""
    found = {
      i.name: self.within_call(i)
      for i in self.instructions
      if i.opcode == 'while' and f'/{scope}/' in f'/{i.scope}/'
    }
    inner = {i.name for body in found.values() for i in body}
    return [(name, body) for name, body in found.items() if name not in inner]

  def within_call(self, instruction):
    """Instructions of all computations that one instruction calls."""
    return [i for name in instruction.called for i in self.within(name)]

  def decode_moves(self):
    """Gathers, permutes and exchanges in the decode loops, largest first; starts counted, done
    halves not.
    """
    moves = [i for _, body in self.loops('decode') for i in body if _base(i.opcode) in MOVES]
    return sorted(moves, key=lambda i: -i.bytes)

  def collectives(self):
    """{opcode: (how many, bytes of the largest)} over the whole program, each body counted once."""
    found = {}
    for i in self.instructions:
      if (kind := _base(i.opcode)) in MOVES + SUMS:
        count, largest = found.get(kind, (0, 0))
        found[kind] = count + 1, max(largest, i.bytes)
    return found

  def positions(self, size: int, weights: tuple = ()):
    """The most places at which an array holds `size` values each: elements / size over arrays with
    an axis of that size.

    weights: sizes of the other axis of parameters, which are no logits.
    """
    return max((n for n, _ in self.over(size, weights)), default=0)

  def over(self, size: int, weights: tuple = ()):
    """(positions, instruction) of each array that holds `size` values at each position."""
    for i in self.instructions:
      for _, shape in i.arrays:
        shape = [n for n in shape if n != 1]
        if size in shape and not (len(shape) == 2 and set(shape) & set(weights)):
          yield math.prod(shape) // size, i


def _base(opcode):
  return opcode.removesuffix('-start')


def _instruction(name, rest):
  found = _OPCODE.search(rest)
  opcode, kind = (found[1], rest[: found.start()]) if found else ('', rest)
  called = tuple(
    c.strip().lstrip('%')
    for group in _CALLED.findall(rest)
    for c in group.strip('{}').split(',')
    if c.strip()
  )
  scope = re.search(r'op_name="([^"]*)"', rest)
  arrays = tuple(
    (t, tuple(int(n) for n in dims.split(',') if n)) for t, dims in _ARRAY.findall(kind)
  )
  return Instruction(name, opcode, arrays, called, scope[1] if scope else '')


def main(path):
  """Prints a program's collectives, and the largest moves in its decode loops."""
  with open(path, encoding='utf-8') as f:
    program = Program(f.read())
  for kind, (number, size) in program.collectives().items():
    print(f'{number} {kind}, the largest {size / 2**20:.3f} MiB')
  print(f'{len(program.loops("decode"))} decode loops; moves in them, largest first:')
  for move in program.decode_moves()[:10]:
    print(f'{move.opcode} {move.bytes / 2**20:.3f} MiB ({move.scope[-120:]})')


if __name__ == '__main__':
  main(sys.argv[1])
