"""What the kernel says of this process: descriptors, mappings, locked memory."""

import os
import socket


def open_fds() -> set[str]:
    """Open descriptors, by number and what they are.

    Without internet sockets: connections to the servers of earlier tests are closed in the time
    of those servers' threads, or of the garbage collector.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:") and _is_internet_socket(int(name)):
                continue
        except OSError:
            continue  # the listing's own, or one that was closed meanwhile
        found.add(f"{name} {target}")
    return found


def _is_internet_socket(fd: int) -> bool:
    found = socket.socket(fileno=fd)
    try:
        return found.family in (socket.AF_INET, socket.AF_INET6)
    finally:
        found.detach()


def locked_kib(pid: int | None = None) -> int:
    """VmLck: what is locked by mlock or memfd_secret, in KiB."""
    with open(f"/proc/{pid or 'self'}/status") as file:
        line = next(line for line in file if line.startswith("VmLck:"))
    return int(line.split()[1])


def mapping_flags(address: int) -> set[str]:
    """VmFlags of the mapping at an address (proc(5), smaps): `lo` locked, `dd`, `dc` and so on."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                low, _, high = first.partition("-")
                inside = int(low, 16) <= address < int(high, 16)
            elif inside and first == "VmFlags:":
                return set(line.split()[1:])
    return set()
