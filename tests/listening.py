"""Which addresses a process and all that it started listen on, from /proc."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
LISTENS = "0A"


def family(root: int) -> set[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, new = set(), [root]
    while new:
        pid = new.pop()
        found.add(pid)
        new += children.get(pid, [])
    return found


def addresses(root: int) -> set[tuple[str, int]]:
    """Address and port of each listening TCP socket of a process and its descendants."""
    listening = dict(_listening("tcp", socket.AF_INET)) | dict(_listening("tcp6", socket.AF_INET6))
    return {listening[inode] for pid in family(root) for inode in _inodes(pid) & set(listening)}


def _listening(table: str, kind: socket.AddressFamily) -> Iterator[tuple[str, tuple[str, int]]]:
    for line in (PROC / "net" / table).read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == LISTENS:
            address, _, port = words[1].partition(":")
            data = bytes.fromhex(address)
            ordered = b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
            yield words[9], (socket.inet_ntop(kind, ordered), int(port, 16))


def _inodes(pid: int) -> set[str]:
    found = set()
    try:
        for name in os.listdir(PROC / str(pid) / "fd"):
            match = re.match(r"socket:\[(\d+)\]", os.readlink(PROC / str(pid) / "fd" / name))
            if match:
                found.add(match[1])
    except OSError:  # it ended meanwhile
        pass
    return found


def command_of(pid: int) -> str:
    """Its command line, or an empty text if it has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
