"""The CPU as several devices, and the chunks for them."""

import dataclasses
import os
import subprocess
import sys

import jax
from places import ROOT
import pytest

from dsr_jax import config_loading
from dsr_jax.runtime import cpu


@pytest.fixture
def machine(monkeypatch):
  """A machine whose cores can be set; it keeps the numbers of devices that JAX was asked for."""

  class Machine:
    asked: list[int] = []

    def has(self, cores):
      monkeypatch.setattr(cpu.os, 'sched_getaffinity', lambda _: range(cores), raising=False)

  found = Machine()
  found.asked = []

  def update(key, value):
    assert key == 'jax_num_cpu_devices'
    found.asked.append(value)
    monkeypatch.setattr(cpu.jax, 'device_count', lambda: value)

  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setattr(cpu.jax.config, 'update', update, raising=False)
  return found


@pytest.mark.parametrize(
  'cores, inputs, devices, chunk',
  [(1, 32, 1, 2), (2, 32, 2, 4), (3, 32, 2, 4), (8, 32, 8, 16), (64, 32, 16, 16), (2, 6, 1, 1)],
)
def test_there_is_a_device_per_core_as_far_as_the_inputs_divide(
  cores, inputs, devices, chunk, machine
):
  machine.has(cores)
  divided = cpu.divide(config_loading.load('scenes', method__inputs_per_step=inputs)).system
  assert machine.asked == [devices]
  assert (divided.rollout_chunk, divided.update_chunk) == (chunk, chunk)


def test_chunks_of_the_config_are_kept_and_limit_the_devices(machine):
  machine.has(8)
  divided = cpu.divide(config_loading.load('scenes', system__update_chunk=2)).system
  assert machine.asked == [2] and (divided.rollout_chunk, divided.update_chunk) == (4, 2)


def test_a_cpu_of_one_device_is_left_alone(machine):
  config = config_loading.load('scenes', system__cpu_devices=1)
  assert cpu.divide(config) == config and not machine.asked


def test_on_an_accelerator_the_chunks_stay_those_of_the_config(machine, monkeypatch):
  machine.has(2)
  monkeypatch.setattr(cpu.jax, 'default_backend', lambda: 'gpu')
  config = config_loading.load('scenes')
  assert cpu.divide(config) == config


def test_devices_of_the_environment_are_kept(machine, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  monkeypatch.setattr(cpu.jax, 'device_count', lambda: 8)
  divided = cpu.divide(config_loading.load('scenes')).system
  assert not machine.asked and divided.rollout_chunk == 16


def test_once_jax_has_started_only_the_chunks_follow():
  jax.devices()
  config = config_loading.load('scenes', system__cpu_devices=64)
  chunk = 2 * jax.device_count()
  assert cpu.divide(config).system == dataclasses.replace(
    config.system, rollout_chunk=chunk, update_chunk=chunk
  )


@pytest.mark.slow
@pytest.mark.parametrize('command', ['benchmark --phases=draw', 'main --workdir={folder}'])
def test_commands_run_on_a_divided_cpu(command, tmp_path):
  words = command.format(folder=tmp_path / 'run').split()
  ran = subprocess.run(
    [sys.executable, '-m', f'dsr_jax.{words[0]}', '--config=scenes_tiny', *words[1:]]
    + ['--config.system.cpu_devices=2'],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  assert '2 x cpu' in ran.stderr
