"""A server that a person started with ``&`` does not write over what the person types."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios

SERVER = """
import os, signal, sys
from veneer_server.logs import configure, get_logger, quiet_in_background
os.setpgid(0, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
configure(sys.argv[1])
log = get_logger("veneer_server.test")
log.info("while-starting")
quiet_in_background()
log.info("hidden-line")
log.warning("warning-line")
os.tcsetpgrp(0, os.getpgrp())  # as the shell's fg does
log.info("foreground-line")
"""


def _printed(log_format: str, *, terminal: bool = True) -> str:
    """What the server above writes to a terminal whose foreground is its parent's."""
    main, other = pty.openpty()
    read, write = os.pipe()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(other, termios.TIOCSCTTY, 0)

    server = [sys.executable, "-c", SERVER, log_format]
    script = f"import subprocess; subprocess.run({server!r})"
    output = other if terminal else write
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=other,
        stdout=output,
        stderr=output,
        preexec_fn=own_terminal,
    ) as shell:
        os.close(other)
        os.close(write)
        text = b""
        try:
            while piece := os.read(main if terminal else read, 4096):
                text += piece
        except OSError:  # a terminal that nobody has open any more
            pass
        shell.wait()
    os.close(main)
    os.close(read)
    return text.decode()


def test_once_ready_a_background_server_shows_only_warnings() -> None:
    printed = _printed("console")
    assert "while-starting" in printed
    assert "only warnings are shown" in printed
    assert "warning-line" in printed
    assert "foreground-line" in printed
    assert "hidden-line" not in printed


def test_logs_for_programs_and_in_pipes_are_whole() -> None:
    assert "hidden-line" in _printed("json")
    piped = _printed("console", terminal=False)
    assert "hidden-line" in piped
    assert "only warnings" not in piped
