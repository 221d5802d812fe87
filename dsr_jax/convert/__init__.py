"""Checkpoints in and out; only this package knows foreign tensor names."""

from dsr_jax.convert.directory import Bundle, load, read_config, save

__all__ = ['Bundle', 'load', 'read_config', 'save']
