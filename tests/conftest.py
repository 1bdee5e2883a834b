"""Fixtures of all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests compare with lies on the CPU; benchmarks/ compares figures of both

# The same examples in each run, and no limit on their time: a machine may stall in the middle of one.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

pytest_plugins = ["tests.servers"]
