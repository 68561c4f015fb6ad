"""HTTP for the service: uvicorn's, with a deadline for each request's head.

uvicorn waits for ever for a first request, and for the rest of any; so silent connections would use up those allowed.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class HeadDeadlineProtocol(H11Protocol):
    """Closes a connection that hasn't brought a request's whole head after ``head_s`` seconds; between requests
    uvicorn's ``timeout_keep_alive`` comes before that."""

    def __init__(self, *arguments, head_s: float, **options):
        super().__init__(*arguments, **options)
        self.head_s, self._deadline = head_s, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._rest()

    def _watch(self) -> None:
        """Have a deadline while a head is awaited, and only then; more bytes of the same head don't move it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_s, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
