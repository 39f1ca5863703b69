"""Who may reach the chat page: this machine, and others that know the password. Known before anything slow is loaded."""

import ipaddress
import os
import socket

PASSWORD_VARIABLE = "QLORA_CHAT_PASSWORD"  # noqa: S105
SHORTEST_PASSWORD = 12


def is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def password_for(address: str) -> str | None:
    """From the environment, which no list of processes shows. Raises ValueError if others could reach the page without one."""
    password = os.environ.get(PASSWORD_VARIABLE)
    if not password and is_loopback(address):
        return None
    if not password:
        raise ValueError(f"--listen {address} lets other machines in, so it needs a password: set {PASSWORD_VARIABLE} in the environment")
    if len(password) < SHORTEST_PASSWORD:
        raise ValueError(f"{PASSWORD_VARIABLE} has {len(password)} characters; take at least {SHORTEST_PASSWORD}")
    return password


def check_place(address: str, port: int | None) -> None:
    """Raises ValueError if there is no such address on this machine, or the port is taken or not allowed."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: a port is a number from 1 to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier page's last connections are no obstacle
            trial.bind(place)
    except (OSError, OverflowError) as error:
        where = f"port {port} of {address}" if port else address
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {where}: {why}; give another --port, or an address of this machine with --listen") from None
