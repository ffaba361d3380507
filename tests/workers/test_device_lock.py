"""The device lock: many evaluate, one times, and a dead holder holds nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from apportion.workers.device_lock import DeviceLock


class WaitedError(Exception):
    """Raised in place of waiting."""


def refuse() -> None:
    raise WaitedError


def test_evaluations_share(tmp_path: Path) -> None:
    one, two = DeviceLock(tmp_path, "cpu"), DeviceLock(tmp_path, "cpu")
    third = DeviceLock(tmp_path, "cpu")
    with one.shared(refuse), two.shared(refuse), pytest.raises(WaitedError):
        with third.exclusive(refuse):
            pass


def test_timing_waits_for_evaluations(tmp_path: Path) -> None:
    one, two = DeviceLock(tmp_path, "cpu"), DeviceLock(tmp_path, "cpu")
    with one.shared(refuse), pytest.raises(WaitedError), two.exclusive(refuse):
        pass
    with two.exclusive(refuse):
        pass


def test_evaluations_let_waiting_timing_through(tmp_path: Path) -> None:
    def try_to_evaluate() -> None:
        with pytest.raises(WaitedError), DeviceLock(tmp_path, "cpu").shared(refuse):
            pass
        raise WaitedError

    with DeviceLock(tmp_path, "cpu").shared(refuse):
        waiting = DeviceLock(tmp_path, "cpu").exclusive(try_to_evaluate)
        with pytest.raises(WaitedError), waiting:
            pass


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_all_wait_for_timing(tmp_path: Path, kind: str) -> None:
    one, two = DeviceLock(tmp_path, "cpu"), DeviceLock(tmp_path, "cpu")
    with one.exclusive(refuse), pytest.raises(WaitedError), getattr(two, kind)(refuse):
        pass


def test_devices_do_not_wait_for_each_other(tmp_path: Path) -> None:
    one, two = DeviceLock(tmp_path, "cpu"), DeviceLock(tmp_path, "cuda-0")
    with one.exclusive(refuse), two.exclusive(refuse), pytest.raises(WaitedError):
        with DeviceLock(tmp_path, "cpu").exclusive(refuse):
            pass


def test_killed_holder_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from apportion.workers.device_lock import DeviceLock\n"
        f"with DeviceLock(Path({str(tmp_path)!r}), 'cpu').exclusive(lambda: None):\n"
        "    print('held', flush=True); time.sleep(3600)"
    )
    holder = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(WaitedError), DeviceLock(tmp_path, "cpu").shared(refuse):
        pass
    holder.kill()
    holder.communicate()
    with DeviceLock(tmp_path, "cpu").exclusive(refuse):
        pass
