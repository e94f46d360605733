"""The process that stays behind: statuses, signals, and an end together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BEGIN = """
import os, signal, sys, time
from elm_jax.cli import watch
parent = os.getpid()
print("once", end=" ")
met = watch.stay_behind("as tried")
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's prctl")


def start(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('child', os.getpid() != parent)", 0),
        ("sys.exit(75)", 75),
        ("raise ValueError('x')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("met(); os.abort()", 134),
        ("os.abort()", 1),
    ],
)
def test_status_is_that_of_the_child(code: str, status: int) -> None:
    process = start(code)
    out, err = process.communicate()
    assert process.returncode == status
    assert out.count("once") == 1 and ("child True" in out) == (status == 0)
    assert ("another process of this run was lost" in err) == (status == 134)
    assert ("did not meet (as tried)" in err) == ("abort" in code and status == 1)


def test_sigterm_is_passed_on() -> None:
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    assert process.stdout is not None and "ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75


@LINUX
def test_the_child_ends_with_a_killed_parent() -> None:
    process = start("print(os.getpid(), flush=True)\nwhile True: time.sleep(0.05)")
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[-1])
    process.kill()
    process.communicate()  # its pipes close with the child
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.05)


def test_nothing_is_done_where_jax_is_loaded() -> None:
    process = start("print('still', os.getpid() == parent)")
    assert "still False" in process.communicate()[0]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['jax'] = None" + BEGIN
         + "print('still', os.getpid() == parent)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "still True" in done.stdout
