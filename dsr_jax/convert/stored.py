"""The common base of opened model directories of all families."""

import functools
import pathlib
from typing import Any

import numpy as np


class Stored:
  """A checked model directory: it has every expected tensor with its shape, and no others. No
  weights are in memory. A family's subclass fills in the attributes.

  Attributes:
    directory: its path.
    layout: 'hf', 'deepseek' or 'showo'.
    config: the model's sizes, with templates.
    processor: its tokenizer.
    checkpoint: its tensors, see `weights.Checkpoint`.
    abstract: shapes of the parameters.
    entries: from `table.entries`, the name of each parameter in this layout.
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
    """An atom of `table.entries`, for any layout, as a view of its file."""
    entry, place = self._entry_of[atom.leaf, atom.layer]
    return entry.split(self.read(entry.name))[place]

  def source(self):
    """dict(name, hash). Reads all weights; InputError if a number is not finite."""
    digest = self.checkpoint.digest()
    self.check_finite()
    return dict(name=str(self.directory), hash=digest)

  def check_finite(self):
    """InputError naming the tensors with numbers that are not finite."""
    here = self.checkpoint.found
    self.checkpoint.check_finite(entry.name for entry in self.entries if entry.name in here)
