"""A non-blocking UDP socket on an address of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

_MAX_DATAGRAM = 65535
# A flood of datagrams must not hold up the physics: what is left waits for the next poll.
_MAX_PER_POLL = 500


def bind_udp(address: tuple[str, int], what: str) -> socket.socket:
    """A non-blocking UDP socket bound to `address` (host, port; port 0 = any free one).

    OSError that says what could not be opened where. No SO_REUSEADDR: two simulators that share a
    port would each get a part of the packets.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(address)
    except (OSError, OverflowError) as error:
        sock.close()
        raise OSError(getattr(error, 'errno', None), f'{what}: cannot open UDP {address[0]}:{address[1]}: '
                      f'{getattr(error, "strerror", None) or error}; is another one running there?') from None
    sock.setblocking(False)
    return sock


def waiting(sock: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """The datagrams that wait in `sock`, with their senders, oldest first."""
    for _ in range(_MAX_PER_POLL):
        try:
            yield sock.recvfrom(_MAX_DATAGRAM)
        except BlockingIOError:
            return
        except ConnectionError:  # an ICMP answer to something sent earlier; the socket is fine
            continue
