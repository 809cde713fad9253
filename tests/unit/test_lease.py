"""Leases: one holder a unit, taken over when it is killed, given back, and never needed for correctness."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phimr_nemo.store import lease as module
from phimr_nemo.store.lease import FreeUnits, Leases, rotated

PATIENCE_SECONDS = 120
HOLDER = """
import sys, time
from pathlib import Path
from phimr_nemo.store.lease import Leases
with Leases(Path(sys.argv[1]), "killed", seconds=float(sys.argv[2])) as leases:
    assert leases.take("unit-00000")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_unit_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path / "leases", "one") as one, Leases(tmp_path / "leases", "two") as two:
        assert one.take("a")
        assert not two.take("a")
        assert two.take("b")
        one.release("a")
        assert two.take("a")
        two.release("b")
        two.release("a")
        # Giving back what another holds changes nothing.
        assert one.take("a")
        two.release("a")
        assert not two.take("a")
    assert not (tmp_path / "leases").exists()


def test_a_holder_that_starts_again_goes_on_at_once(tmp_path: Path) -> None:
    before = Leases(tmp_path, "one")
    assert before.take("a")
    with Leases(tmp_path, "two") as two, Leases(tmp_path, "one") as again:
        assert not two.take("a")
        assert again.take("a")


def test_a_killed_holder_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    seconds = 2.0
    command = [sys.executable, "-c", HOLDER, str(tmp_path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with Leases(tmp_path, "heir", seconds=seconds) as heir:
            lease = tmp_path / "unit-00000.lease"
            first, touched = lease.stat().st_mtime, False
            started = time.monotonic()
            # A living holder touches its lease, and keeps it.
            while not touched and time.monotonic() - started < PATIENCE_SECONDS:
                assert not heir.take("unit-00000") or process.poll() is not None
                touched = lease.stat().st_mtime > first
                time.sleep(0.05)
            assert touched
            process.kill()
            process.wait()
            while not heir.take("unit-00000"):
                assert time.monotonic() - started < PATIENCE_SECONDS
                time.sleep(0.05)
            assert lease.read_text("utf-8") == "heir"


def test_an_expired_lease_is_taken_over_once(tmp_path: Path) -> None:
    """By the file system's clock: that of the machine may say anything."""
    Leases(tmp_path, "old").take("a")
    path = tmp_path / "a.lease"
    long_ago = path.stat().st_mtime - 10 * module.LEASE_SECONDS
    os.utime(path, (long_ago, long_ago))
    heirs = [Leases(tmp_path, f"heir-{number}") for number in range(8)]
    assert sum(heir.take("a") for heir in heirs) == 1


def test_units_are_shared_without_one_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    done: dict[int, str] = {3: "before"}
    with Leases(tmp_path, "one") as one, Leases(tmp_path, "two") as two:
        parts = {
            name: FreeUnits(rotated(range(10), place, 2), leases, name="u", is_done=done.__contains__).one_by_one()
            for place, (name, leases) in enumerate({"one": one, "two": two}.items())
        }
        while parts:
            for name, part in list(parts.items()):
                unit = next(part, None)
                if unit is None:
                    del parts[name]
                    continue
                assert unit not in done
                done[unit] = name
    assert set(done) == set(range(10))
    assert set(done.values()) == {"before", "one", "two"}


def test_a_process_leaves_what_others_hold_or_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: set[int] = set()
    other = Leases(tmp_path, "other")
    other.take("u-00001")
    with Leases(tmp_path, "one") as one:
        for unit in FreeUnits(range(3), one, name="u", is_done=done.__contains__).one_by_one():
            done.add(unit)
        assert done == {0, 2}
        monkeypatch.setattr(module.time, "sleep", lambda _: done.add(1))
        assert list(FreeUnits(range(3), one, name="u", is_done=done.__contains__, wait=True)) == []
