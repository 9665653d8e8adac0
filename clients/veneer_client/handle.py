# Generated from aio_handle.py by `make client-sync`: edit that file.
"""``with client.adapter("sql") as sql:`` - one adapter, fixed to one revision.

The name is resolved once, at entry: all calls inside use that revision, whatever is
published under the name meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Unpack

from veneer_registry.errors import AdapterNotFound, VeneerError

from veneer_client.records import AdapterDetails, AdapterInfo
from veneer_client.types import BoundOptions, Generation, MessageLike, Prompt

if TYPE_CHECKING:
    from veneer_client.client import Client
    from veneer_client.streams import GenerationStream

__all__ = ["AdapterHandle"]

_NOT_ENTERED: Final = "use the adapter inside its `with`: entering it pins the revision"

_UNPIN_S: Final = 5.0
"""Timeout for removing a pin that may or may not have been set."""


class AdapterHandle:
    """One adapter at one revision; made by `Client.adapter`."""

    def __init__(self, client: Client, name: str, *, activate: bool, pin: bool) -> None:
        self._client = client
        self._name = name
        self._activate = activate
        self._pin = pin
        self._info: AdapterInfo | None = None
        self._pinned = False

    @property
    def info(self) -> AdapterInfo:
        """The revision's state at entry. RuntimeError outside the ``with``."""
        if self._info is None:
            raise RuntimeError(_NOT_ENTERED)
        return self._info

    @property
    def ref(self) -> str:
        """``name@revision`` in full, which every call uses."""
        return f"{self.info.name}@{self.info.revision}"

    def __enter__(self) -> AdapterHandle:
        found = self._client.get(self._name)
        self._info = found.adapter
        if self._pin and not self._info.pinned:
            try:
                self._info = self._client.pin(self.ref)
            except BaseException:
                # A deadline, cancellation or Ctrl-C ends our waiting, not the server's work.
                with suppress(VeneerError):
                    self._client.unpin(self.ref, timeout_s=_UNPIN_S)
                raise
            self._pinned = True
        elif self._activate or self._pin:
            self._info = self._client.activate(self.ref)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._pinned:
            return
        self._pinned = False
        try:
            self._client.unpin(self.ref)
        except AdapterNotFound:
            pass  # deleted meanwhile, and its pin with it
        except VeneerError:
            if error is None:  # must not mask an error of the block
                raise

    def generate(self, prompt: Prompt, **options: Unpack[BoundOptions]) -> Generation:
        """`Client.generate` with this adapter."""
        return self._client.generate(prompt, adapter=self.ref, **options)

    def generate_stream(
        self, prompt: Prompt, **options: Unpack[BoundOptions]
    ) -> GenerationStream:
        """`Client.generate_stream` with this adapter."""
        return self._client.generate_stream(prompt, adapter=self.ref, **options)

    def chat(
        self, messages: Iterable[MessageLike], **options: Unpack[BoundOptions]
    ) -> Generation:
        """`Client.chat` with this adapter."""
        return self._client.chat(messages, adapter=self.ref, **options)

    def chat_stream(
        self, messages: Iterable[MessageLike], **options: Unpack[BoundOptions]
    ) -> GenerationStream:
        """`Client.chat_stream` with this adapter."""
        return self._client.chat_stream(messages, adapter=self.ref, **options)

    def details(self) -> AdapterDetails:
        """The adapter's present state on the server."""
        return self._client.get(self.ref)
