"""Names by which a service without tokens may be called.

A page on the web can make a browser ask a service on the reader's own machine: its name first leads
to its own server and then to 127.0.0.1 (DNS rebinding). The browser takes both for one origin, but
it still sends the name of the page in `Host`.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from starlette.types import Scope

ANY = "*"


def is_known_host(scope: Scope, allowed: Sequence[str]) -> bool:
    """Whether each `Host` of a request is a name of this machine or an allowed one.

    A request without `Host` passes: no browser sends one.

    Args:
        scope: the request; `server` is the address on which it came in.
        allowed: names besides; `*.example.org` stands for all names below, `*` for any.
    """
    given = [value for name, value in scope["headers"] if name.lower() == b"host"]
    here = (scope.get("server") or ("",))[0]
    return all(_is_known(_name_of(value.decode("latin-1")), here, allowed) for value in given)


def is_address(text: str) -> bool:
    """Whether it is an IP address, not a name."""
    return _address(text) is not None


def _is_known(name: str, here: str, allowed: Iterable[str]) -> bool:
    if _is_loopback(name) or _same_address(name, here):
        return True
    return any(_matches(name, pattern.lower()) for pattern in allowed)


def _name_of(host: str) -> str:
    """The name in `name:port` or `[address]:port`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def _same_address(name: str, here: str) -> bool:
    address = _address(name)
    return name == here.lower() if address is None else address == _address(here)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return name.endswith(pattern[1:])
    return pattern in (ANY, name)
