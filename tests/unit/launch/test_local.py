"""Where the ranks of one machine meet."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from rewarm.launch.local import free_port

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not RANGE.exists(), reason="no Linux")
def test_a_port_is_free_and_is_given_to_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the system may give to anybody's connection was taken before rank 0 listened on it."""
    first = int(RANGE.read_text().split()[0])
    port = free_port()
    assert 10_000 <= port < first
    with socket.socket() as server:
        server.bind(("", port))
        server.listen()
        draws = iter([port, port, port + 1, *range(port + 2, port + 60)])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda self, start, stop: next(draws))
        assert free_port() > port
