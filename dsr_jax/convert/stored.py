"""What the model directories of all families have in common once they are open."""

import functools
import pathlib
from typing import Any

import numpy as np


class Stored:
  """A model directory, checked: every tensor is there, of its shape, and none besides. Nothing of
  the weights is in memory. A family's class fills in the attributes.

  Attributes:
    directory: where it lies.
    layout: 'hf', 'deepseek' or 'showo'.
    config: the model's sizes, with templates.
    processor: its tokenizer.
    checkpoint: its tensors, see `weights.Checkpoint`.
    abstract: shapes of the parameters.
    entries: of `table.entries`, what each parameter is called here.
    kept_aside: see `directory.Bundle`.
  """

  directory: pathlib.Path
  layout: str
  config: Any
  processor: Any
  checkpoint: Any
  abstract: Any
  entries: list
  kept_aside: dict[str, np.ndarray]

  def read(self, name):
    """A tensor by its name in this layout, as a view of its file."""
    return self.checkpoint.read(name)

  @functools.cached_property
  def _entry_of(self):
    return {
      (atom.leaf, atom.layer): (entry, place)
      for entry in self.entries
      for place, atom in enumerate(entry.atoms)
    }

  def atom(self, atom):
    """An atom of `table.entries`, of any layout, as a view of its file."""
    entry, place = self._entry_of[atom.leaf, atom.layer]
    return entry.split(self.read(entry.name))[place]

  def source(self):
    """dict(name, hash); reads all the weights, and InputError if a number is not finite."""
    digest = self.checkpoint.digest()
    self.check_finite()
    return dict(name=str(self.directory), hash=digest)

  def check_finite(self):
    """InputError naming the tensors that hold numbers which are not finite."""
    here = self.checkpoint.found
    self.checkpoint.check_finite(entry.name for entry in self.entries if entry.name in here)
