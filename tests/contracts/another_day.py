"""A plugin for pytest: the clock of a day and some seconds later, for what is computed while tests are collected."""

from __future__ import annotations

import time

SHIFT_SECONDS = 100_003

_now, _now_ns = time.time, time.time_ns
time.time = lambda: _now() + SHIFT_SECONDS
time.time_ns = lambda: _now_ns() + SHIFT_SECONDS * 10**9
