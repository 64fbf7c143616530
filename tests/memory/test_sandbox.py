"""Confinement, in forked processes that then try everything; each beside one that is not."""

import ctypes
import errno
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmsfs import libc
from kmsfs.memory import landlock, sandbox, seccomp
from tests.support import forked
from tests.support.forbidden import LISTENING, LOOKING, REFUSED, WRITING, Attempts

Outcomes = dict[str, str]


def has_landlock(abi: int) -> bool:
    try:
        return landlock.kernel_abi() >= abi
    except OSError:
        return False


needs_landlock = pytest.mark.skipif(not has_landlock(4), reason="a kernel without Landlock's ports")
needs_root = pytest.mark.needs_root


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A TCP port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def attempts(tmp_path: Path, listener: socket.socket) -> Attempts:
    """What a confined process tries in vain, in a directory of its own."""
    directory = tmp_path / "attempts"
    directory.mkdir()
    found = Attempts(directory, listener.getsockname()[1])
    found.prepare()
    return found


def in_child(call: Callable[[], object]) -> object:
    """What `call` returns in a forked process, by way of JSON."""
    read_end, write_end = os.pipe()

    def tell() -> bool:
        with open(write_end, "w") as pipe:
            json.dump(call(), pipe)
        return True

    pid = forked.start(tell)
    os.close(write_end)
    with open(read_end) as pipe:
        text = pipe.read()
    assert forked.wait(pid) == 0
    return json.loads(text)


def confined_daemon(call: Callable[[], object], fill_beneath: int | None = None) -> object:
    """What `call` returns in a process confined as the daemon is."""

    def confine_and_call() -> object:
        report = sandbox.confine_daemon(fill_beneath)
        assert report.gaps == ()
        return call()

    return in_child(confine_and_call)


@needs_root
def test_control_every_attempt_succeeds_where_nothing_is_confined(attempts: Attempts) -> None:
    outcomes = in_child(attempts.outcomes)
    assert isinstance(outcomes, dict)
    assert set(outcomes.values()) == {"done"}, outcomes


@needs_landlock
def test_daemon_can_neither_exec_nor_write_nor_reach_a_network_nor_another_process(
    attempts: Attempts,
) -> None:
    outcomes = confined_daemon(attempts.outcomes)
    assert isinstance(outcomes, dict)
    assert set(outcomes.values()) <= REFUSED, outcomes


@needs_landlock
def test_daemon_still_reads_makes_threads_uses_unix_sockets_and_writes_to_what_is_open(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(tmp_path / "log"))
    opened = os.open(path, os.O_WRONLY)

    def use() -> object:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(path.read_text()))
        thread.start()
        thread.join()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"line", str(tmp_path / "log"))
        os.write(opened, b"changed")
        memory = libc.memfd_secret()
        os.ftruncate(memory, libc.PAGE_BYTES)
        libc.munmap(libc.map_shared(memory, libc.PAGE_BYTES), libc.PAGE_BYTES)
        return seen

    assert confined_daemon(use) == ["content"]
    assert log.recv(10) == b"line"
    assert path.read_bytes() == b"changed"
    os.close(opened)
    log.close()


@needs_landlock
def test_daemon_still_signals_a_process_that_is_not_confined() -> None:
    pid = forked.start(lambda: bool(signal.pause()))
    pidfd = os.pidfd_open(pid)
    assert confined_daemon(lambda: signal.pidfd_send_signal(pidfd, signal.SIGKILL)) is None
    assert forked.wait(pid) == -signal.SIGKILL
    os.close(pidfd)


@needs_landlock
def test_daemon_of_a_ramfs_fills_it_and_writes_nowhere_else(
    attempts: Attempts, tmp_path: Path
) -> None:
    ram = tmp_path / "ram"
    (ram / "below").mkdir(parents=True)
    inside = Attempts(ram)
    inside.prepare()
    root_fd = os.open(ram, os.O_PATH | os.O_DIRECTORY)
    filling = [name for name in WRITING if name != "make a socket"]

    def fill() -> object:
        (ram / "below" / "file").write_bytes(b"content")
        (ram / "below" / "file").rename(ram / "moved")
        os.link(ram / "moved", ram / "below" / "linked")
        return [inside.outcomes(*filling), inside.outcomes("make a socket"), attempts.outcomes()]

    answer = confined_daemon(fill, root_fd)
    assert isinstance(answer, list)
    within, sockets, outside = answer
    assert set(within.values()) == {"done"}, within
    assert set(sockets.values()) <= REFUSED
    assert set(outside.values()) <= REFUSED, outside
    os.close(root_fd)


@needs_landlock
def test_worker_reaches_its_own_ports_only(attempts: Attempts, listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        elsewhere = Attempts(attempts.directory, other.getsockname()[1])

        def attempt() -> object:
            report = sandbox.confine_worker({attempts.port})
            assert report.gaps == ()
            names = (*WRITING, *LOOKING, *LISTENING, "make a packet socket")
            return [
                attempts.outcomes("connect by TCP", "make a UDP socket"),
                elsewhere.outcomes("connect by TCP"),
                attempts.outcomes(*names),
                socket.getaddrinfo("localhost", 443, type=socket.SOCK_STREAM) != [],
            ]

        control = in_child(lambda: elsewhere.outcomes("connect by TCP"))
        answer = in_child(attempt)
    assert control == {"connect by TCP": "done"}
    assert isinstance(answer, list)
    own, other_port, everything_else, resolves = answer
    assert set(own.values()) == {"done"}, own
    assert set(other_port.values()) <= REFUSED
    assert set(everything_else.values()) <= REFUSED, everything_else
    assert resolves


def test_a_process_with_threads_is_not_confined_by_halves() -> None:
    def check() -> bool:
        waiting = threading.Event()
        thread = threading.Thread(target=waiting.wait)
        thread.start()
        try:
            sandbox.confine_daemon(None)
        except RuntimeError:
            return True
        finally:
            waiting.set()
            thread.join()
        return False

    assert forked.holds(check)


# --- lesser kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("abi", range(1, 8))
def test_older_landlock_still_forbids_what_it_knows_and_names_what_it_does_not(
    attempts: Attempts, abi: int
) -> None:
    if not has_landlock(abi):
        pytest.skip("this kernel's Landlock is older")

    def attempt() -> object:
        landlock.kernel_abi = lambda: abi
        report = sandbox.confine_worker({443})
        return [attempts.outcomes(*WRITING, "cut a file", "connect by TCP"), report.gaps]

    answer = in_child(attempt)
    assert isinstance(answer, list)
    outcomes, gaps = answer
    open_to_it = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert open_to_it == ({"cut a file"} if abi < 3 else set()) | (
        {"connect by TCP"} if abi < 4 else set()
    )
    assert len(gaps) == len(open_to_it)


def test_without_landlock_that_is_said_and_system_calls_are_filtered_all_the_same(
    attempts: Attempts,
) -> None:
    def attempt() -> object:
        def refuse() -> int:
            raise OSError(errno.EOPNOTSUPP, "switched off")

        landlock.kernel_abi = refuse
        report = sandbox.confine_daemon(None)
        names = ("exec", "ptrace", "make a TCP socket", "create a file")
        return [attempts.outcomes(*names), report.landlock_abi, report.seccomp, report.gaps]

    answer = in_child(attempt)
    assert isinstance(answer, list)
    outcomes, abi, filtered, gaps = answer
    assert outcomes.pop("create a file") == "done"
    assert set(outcomes.values()) == {"EPERM"}
    assert (abi, filtered, len(gaps)) == (0, True, 1)
    assert "Landlock" in gaps[0]


def test_without_seccomp_that_is_said() -> None:
    def attempt() -> object:
        def refuse(_program: bytes) -> None:
            raise OSError(errno.EINVAL, "no filters")

        libc.set_seccomp_filter = refuse
        report = sandbox.confine_daemon(None)
        return [report.seccomp, [gap for gap in report.gaps if "seccomp" in gap]]

    answer = in_child(attempt)
    assert isinstance(answer, list)
    filtered, gaps = answer
    assert not filtered
    assert len(gaps) == 1


def test_landlock_that_could_not_link_leaves_the_ramfs_view_without_and_says_so(
    tmp_path: Path,
) -> None:
    root_fd = os.open(tmp_path, os.O_PATH)

    def attempt() -> object:
        landlock.kernel_abi = lambda: 1
        report = sandbox.confine_daemon(root_fd)
        return [report.landlock_abi, len(report.gaps)]

    assert in_child(attempt) == [0, 1]
    os.close(root_fd)


def test_landlock_that_the_kernel_refuses_is_said() -> None:
    def attempt() -> object:
        def refuse(_fd: int) -> None:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

        landlock._restrict_self = refuse
        return any("refused" in gap for gap in sandbox.confine_daemon(None).gaps)

    if has_landlock(1):
        assert in_child(attempt) is True


def test_gaps_name_what_an_abi_leaves_open() -> None:
    assert landlock.gaps(7, needs_ports=True) == ()
    assert len(landlock.gaps(3, needs_ports=True)) == 1
    assert landlock.gaps(3, needs_ports=False) == ()
    assert len(landlock.gaps(2, needs_ports=True)) == 2


# --- the filters themselves -----------------------------------------------------------------------

KILLED, REFUSED_CALL, ALLOWED = "killed", "refused", "allowed"


def verdict(program: bytes, arch: int, number: int, *arguments: int) -> str:
    """What a BPF program answers, by the rules of linux/filter.h."""
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x35:
                at += if_true if accumulator >= operand else if_false
            case 0x45:
                at += if_true if accumulator & operand else if_false
            case 0x06:
                refused = 0x50000 | errno.EPERM
                return {0x80000000: KILLED, 0x7FFF0000: ALLOWED, refused: REFUSED_CALL}[operand]
            case _:
                raise AssertionError(f"no instruction {code:#x} belongs here")


machines = pytest.mark.parametrize("machine", seccomp.MACHINES.values(), ids=seccomp.MACHINES)


@machines
def test_every_call_named_is_refused_and_others_are_allowed(machine: seccomp.Machine) -> None:
    program = seccomp.program(machine, seccomp.UNIX_ONLY)
    checked = {"socket", "sendto", "sendmsg", "sendmmsg"}
    for name, number in machine.numbers.items():
        if name not in checked:
            assert verdict(program, machine.audit_arch, number) == REFUSED_CALL, name
    for number in set(range(600)) - set(machine.numbers.values()):
        assert verdict(program, machine.audit_arch, number) == ALLOWED


@machines
def test_another_machines_calls_end_the_process(machine: seccomp.Machine) -> None:
    program = seccomp.program(machine, seccomp.CLIENT_ONLY)
    assert verdict(program, 0x40000003, 1) == KILLED
    for other in seccomp.MACHINES.values():
        if other is not machine:
            assert verdict(program, other.audit_arch, 1) == KILLED
    x32 = verdict(program, machine.audit_arch, 0x40000000 | 1)
    assert x32 == (KILLED if machine.has_x32 else ALLOWED)


@machines
def test_sockets_are_those_that_a_process_needs(machine: seccomp.Machine) -> None:
    def may(network: seccomp.Network, *arguments: int) -> bool:
        program = seccomp.program(machine, network)
        found = verdict(program, machine.audit_arch, machine.numbers["socket"], *arguments)
        return found == ALLOWED

    stream = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    assert may(seccomp.UNIX_ONLY, socket.AF_UNIX, stream)
    for family in set(range(46)) - {socket.AF_UNIX}:
        assert not may(seccomp.UNIX_ONLY, family, stream), family
    for family in (socket.AF_INET, socket.AF_INET6):
        assert may(seccomp.CLIENT_ONLY, family, stream)
        assert may(seccomp.CLIENT_ONLY, family, stream, socket.IPPROTO_TCP)
        assert may(seccomp.CLIENT_ONLY, family, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
        assert not may(seccomp.CLIENT_ONLY, family, socket.SOCK_RAW, socket.IPPROTO_TCP)
        assert not may(seccomp.CLIENT_ONLY, family, stream, 262)  # MPTCP
        assert not may(seccomp.CLIENT_ONLY, family, stream, 132)  # SCTP
    assert may(seccomp.CLIENT_ONLY, socket.AF_UNIX, stream)
    assert may(seccomp.CLIENT_ONLY, socket.AF_NETLINK, socket.SOCK_RAW)
    assert not may(seccomp.CLIENT_ONLY, socket.AF_PACKET, socket.SOCK_RAW)


@machines
def test_sending_must_not_connect(machine: seccomp.Machine) -> None:
    program = seccomp.program(machine, seccomp.CLIENT_ONLY)
    for name, before in {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}.items():
        number, ignored = machine.numbers[name], (0x20000000,) * before
        sends = verdict(program, machine.audit_arch, number, *ignored, socket.MSG_NOSIGNAL)
        connects = verdict(program, machine.audit_arch, number, *ignored, 0x20000000)
        assert (sends, connects) == (ALLOWED, REFUSED_CALL), name


def test_an_x32_call_ends_a_confined_process() -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x32 is of 64-bit x86")

    def call() -> bool:
        sandbox.confine_daemon(None)
        ctypes.CDLL(None).syscall(0x40000000 | 39)
        return True

    assert forked.wait(forked.start(call)) == -signal.SIGSYS


def test_the_numbers_are_those_of_the_kernels_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    defined = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[1].startswith("__NR_"):
            defined[words[1].removeprefix("__NR_")] = int(words[2])
    numbers = seccomp.MACHINES["x86_64"].numbers
    assert {name: defined[name] for name in numbers} == numbers
