"""While the engine loads, it ends with the front process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from veneer_server.engine.process import WhileLoading
from veneer_server.progress import StartPart, stage
from veneer_server.wire.messages import FromEngine, StartProgress


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def load(loading: WhileLoading, work: Callable[[], None]) -> None:
    with loading.running(), stage("packing the weights", total=3, unit="layers") as part:
        part.update(1)
        work()


def test_the_front_is_told() -> None:
    sent: list[FromEngine] = []
    load(WhileLoading(sent.extend), lambda: None)
    parts = [message.part for message in sent if isinstance(message, StartProgress)]
    assert parts[0] == StartPart("packing the weights", 0, 3, "layers")
    assert parts[-1] == StartPart("packing the weights", 1, 3, "layers", "done")


def test_a_front_that_cannot_be_told_is_no_damaged_file() -> None:
    """Whoever reads weights takes an OSError for theirs, and would remove them."""

    def send(messages: list[FromEngine]) -> None:
        raise BrokenPipeError

    with pytest.raises(SystemExit):
        load(WhileLoading(send), lambda: None)


def test_the_fronts_end_interrupts_what_waits() -> None:
    cleaned = []

    def compile_kernels() -> None:
        gone = threading.Thread(target=loading.front_gone)
        try:
            gone.start()
            threading.Event().wait(60)
        finally:
            cleaned.append(True)
            gone.join()

    loading = WhileLoading(lambda messages: None)
    with pytest.raises(SystemExit):
        load(loading, compile_kernels)
    assert cleaned == [True]


def test_once_it_is_loaded_the_step_loop_hears_of_it_alone() -> None:
    loading = WhileLoading(lambda messages: None)
    load(loading, lambda: None)
    loading.front_gone()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
