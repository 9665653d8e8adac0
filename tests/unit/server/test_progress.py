"""Progress of the parts of a start: reported in time, as text or fields, and drawn only on a
terminal that has the server in the foreground."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from veneer_registry.child_python import child_python
from veneer_server import progress
from veneer_server.progress import SINK, Display, StartPart, StartStopped, stage

WAIT_S = 60


class Lines(logging.Handler):
    """What is logged, and the means to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.records.append(record)
            self._more.notify_all()

    def wait_for(self, holds: Callable[[], bool]) -> None:
        with self._more:
            assert self._more.wait_for(holds, WAIT_S), self.texts

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [record.veneer_fields for record in self.records]  # type: ignore[attr-defined]


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, handler = logging.getLogger(progress.__name__), Lines()
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)  # which forgets, too, what was found disabled before
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


@contextmanager
def told_to(display: Display) -> Iterator[None]:
    before = SINK.set(display)
    try:
        yield
    finally:
        SINK.reset(before)


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown(clock: Clock) -> Iterator[Display]:
    """One that says nothing by itself: its lines are due in an hour."""
    display = Display(every_s=3600, clock=clock)
    with told_to(display):
        yield display


def test_a_part_that_runs_is_told_again_and_again(lines: Lines) -> None:
    with told_to(Display(every_s=0.02)), stage("compiling the kernels"):
        lines.wait_for(lambda: len(lines.records) >= 3)
    for text in lines.texts[:3]:
        assert re.fullmatch(r"compiling the kernels: \d\.\d s so far", text)
    assert "done in" in lines.texts[-1]


def test_words_say_how_much_and_how_long(shown: Display, clock: Clock, lines: Lines) -> None:
    with stage("downloading the base", total=98_000_000, unit="bytes") as part:
        part.update(24_500_000)
        clock.now += 1
        assert shown.doing == "downloading the base: 24 of 98 MB, 1.0 s so far"  # too early
        clock.now += 9
        assert shown.doing == "downloading the base: 24 of 98 MB, 10 s so far, about 30 s left"
        part.update(98_000_000)
        clock.now += 2
    assert shown.doing == ""
    assert lines.texts == ["downloading the base: done in 12 s (98 of 98 MB)"]


def test_the_time_left_does_not_count_what_came_before_the_first_tensor(
    shown: Display, clock: Clock
) -> None:
    """Importing torch took 10 s of the first 15, and 17 minutes seemed to be left."""
    with stage("importing the base", total=100, unit="tensors") as part:
        clock.now += 10
        part.update(1)
        assert shown.doing == "importing the base: 1 of 100 tensors, 10 s so far"
        clock.now += 4
        part.update(21)
        expected = "importing the base: 21 of 100 tensors, 14 s so far, about 16 s left"
        assert shown.doing == expected


def test_fields_for_a_program(clock: Clock, lines: Lines) -> None:
    display = Display(structured=True, every_s=0.02, clock=clock)
    with told_to(display), stage("packing the weights", total=30, unit="layers") as part:
        part.update(10)
        clock.now += 10  # lines are due by this clock
        lines.wait_for(lambda: bool(lines.records))
    assert {record.getMessage() for record in lines.records} == {"progress"}
    running = {"part": "packing the weights", "state": "running", "unit": "layers"}
    running |= {"done": 10, "total": 30, "seconds": 10, "left_s": 20}
    assert lines.fields[0] == running
    done = {**running, "state": "done"}
    del done["left_s"]
    assert lines.fields[-1] == done


def test_a_part_that_fails_says_so(shown: Display, clock: Clock, lines: Lines) -> None:
    def fail() -> None:
        with stage("importing the base"):
            clock.now += 3
            raise OSError("full")

    # The test's own error.
    with pytest.raises(OSError, match="full"):
        fail()
    assert lines.texts == ["importing the base: stopped unfinished after 3.0 s"]
    assert shown.doing == ""


def test_what_was_kept_from_an_earlier_start_takes_no_line(
    shown: Display, clock: Clock, lines: Lines
) -> None:
    with stage("hashing the base", unit="bytes"):
        pass
    assert lines.texts == []
    with stage("restoring adapters", total=1, unit="adapters") as part:
        part.advance()
    assert lines.texts == ["restoring adapters: done in 0.0 s (1 of 1 adapters)"]


def test_the_part_within_another_is_what_is_done_now(shown: Display) -> None:
    with stage("loading the base"):
        with stage("packing the weights"):
            assert shown.doing.startswith("packing the weights")
        assert shown.doing.startswith("loading the base")


def test_a_start_that_is_given_up_ends_its_parts(shown: Display) -> None:
    with stage("loading the base") as outer:
        shown.stop()
        with pytest.raises(StartStopped):
            outer.update(1)
        with pytest.raises(StartStopped), stage("packing the weights"):
            raise AssertionError("it must not begin")
    assert shown.doing == ""


def test_without_anybody_who_listens_a_part_goes_on() -> None:
    with stage("compiling the kernels") as part:
        part.advance()


def test_times_to_come_are_no_nonsense(shown: Display, clock: Clock) -> None:
    """More than all, of a download whose size was not foreseen."""
    with stage("downloading the base", total=10, unit="layers") as part:
        part.update(12)
        clock.now += 10
        assert shown.doing == "downloading the base: 12 of 10 layers, 10 s so far"
        part.update(10)  # what is done of it now was not counted
        assert shown.doing == "downloading the base: 10 of 10 layers, 10 s so far"
        shown(StartPart("downloading the base", 0, 0))


# ------------------------------------------------------------------------------ terminal

_IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "background":
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    os.setpgid(0, 0)
    import signal
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
from veneer_server import logs, progress
logs.configure(sys.argv[2])
display = progress.Display(every_s=0.05)
progress.SINK.set(display)
import threading
waited = threading.Event()
with progress.stage("packing the weights", total=30, unit="layers") as part:
    part.update(15)
    waited.wait(0.7)
    logs.get_logger("veneer_server.app").info("another line")
"""


def on_a_terminal(place: str, log_format: str) -> str:
    """What a part writes to a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        child_python("-c", _IN_A_TERMINAL, place, log_format),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 4096):
                written += piece
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


def test_a_bar_is_drawn_in_the_foreground_and_goes() -> None:
    text = on_a_terminal("foreground", "console")
    assert "\x1b[K[##########..........] packing the weights: 15 of 30 layers" in text
    # Drawn in place: what is left are lines of the log, each at the start of its line.
    left = [line.rpartition("\x1b[K\r")[2] for line in text.split("\r\n")]
    assert re.fullmatch(r"\S+ info    another line", left[0])
    assert re.match(r"\S+ info    packing the weights: done in ", left[1])
    assert left[2:] == [""]


@pytest.mark.parametrize(
    ("place", "log_format"), [("background", "console"), ("foreground", "json")]
)
def test_elsewhere_nothing_is_drawn(place: str, log_format: str) -> None:
    text = on_a_terminal(place, log_format)
    assert "\x1b" not in text
    assert text.count("packing the weights") >= 3
    assert "another line" in text
