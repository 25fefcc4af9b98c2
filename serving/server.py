"""The server: uvicorn, with time limits for slow clients and a graceful shutdown."""
import asyncio
import contextlib
import errno
import logging
import signal
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from errors import UserError

HEADERS = 16 * 1024  # bytes of the headers of a request
GRACE = 5  # seconds to stop, beyond those for the last body, its response and the transfer


def protocol_class(limits):
    """uvicorn's protocol, which by itself waits for ever for headers and for clients that do not read, with limits."""

    class Protocol(H11Protocol):
        _timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            self._within()

        def data_received(self, data):
            super().data_received(data)
            if self._busy():
                self._cancel()
            elif self._timer is None:
                self._within()

        def on_response_complete(self):
            super().on_response_complete()
            if not self._busy() and (self.transport.is_closing() or self.transport.get_write_buffer_size()):
                self._within()

        def connection_lost(self, exc):
            self._cancel()
            super().connection_lost(exc)

        def _busy(self):
            return self.cycle is not None and not self.cycle.response_complete

        def _within(self):
            self._cancel()
            self._timer = self.loop.call_later(limits.slow, self._late)

        def _cancel(self):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self):
            self._timer = None
            if not self._busy():
                self.transport.abort()

        def pause_writing(self):
            super().pause_writing()
            self._stuck = self.loop.call_later(limits.slow, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            self._stuck.cancel()

    return Protocol


def listen(host, port):
    """A socket that is bound to the address and does not listen yet.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'-host={host} -port={port}: {reason}; choose another address or port') from None


def start_listening(listener, host, port):
    """Lets clients connect to the result of `listen(host, port)`.

    A process that has bound the same address meanwhile may have been first: that is refused only now.

    Returns:
        `listener`, or with port 0, where the system chooses, a socket with another port if its choice was taken.
    Raises:
        UserError: another process listens there.
    """
    while True:
        try:
            listener.listen(2048)
            return listener
        except OSError as error:
            listener.close()
            if port or error.errno != errno.EADDRINUSE:
                reason = f'{error.strerror}; choose another address or port'
                raise UserError(f'-host={host} -port={port}: {reason}') from None
            listener = listen(host, port)


async def serve(application, listener, limits, stopping):
    """Serves until SIGINT or SIGTERM, then answers what it has accepted. A second signal stops it within seconds.

    Args:
        application: ASGI application.
        listener: result of `listen`.
        limits: `Limits`.
        stopping: function that is called at the first signal.
    """
    logging.getLogger('uvicorn').setLevel(logging.CRITICAL)  # its warnings are of malformed requests
    server = uvicorn.Server(uvicorn.Config(
        application, http=protocol_class(limits), ws='none', lifespan='off', log_config=None, access_log=False,
        server_header=False, proxy_headers=False, h11_max_incomplete_event_size=HEADERS, timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.timeout + 2 * limits.slow + GRACE)))

    def stop():
        server.force_exit = server.should_exit
        server.should_exit = True
        stopping()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    server.capture_signals = contextlib.nullcontext
    await server.serve([listener])
