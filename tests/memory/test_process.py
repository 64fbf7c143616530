"""What a process does for itself, as the kernel has it."""

import os
import resource
import select
import signal

from kmsfs import libc
from kmsfs.memory import process
from kmsfs.store.cache import MAX_WAITING
from tests.support import forked
from tests.support.process_facts import locked_kib, mapping_flags


def test_a_hardened_process_is_undumpable_and_leaves_no_core() -> None:
    def check() -> bool:
        before = libc.prctl(libc.PR_GET_DUMPABLE)
        process.harden("kmsfs-test")
        return (before, libc.prctl(libc.PR_GET_DUMPABLE)) == (1, 0) and resource.getrlimit(
            resource.RLIMIT_CORE
        ) == (0, 0)

    assert forked.holds(check)


def test_nobody_of_the_same_user_can_read_a_hardened_processs_memory() -> None:
    ready_r, ready_w = os.pipe()

    def be_hardened() -> bool:
        forked.become_nobody()
        libc.prctl(libc.PR_SET_DUMPABLE, 1)
        process.harden("kmsfs-test")
        os.write(ready_w, b"x")
        signal.pause()
        return True

    pid = forked.start(be_hardened)
    os.close(ready_w)
    assert os.read(ready_r, 1) == b"x"

    def check() -> bool:
        forked.become_nobody()
        try:
            os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
        except PermissionError:
            return True
        return False

    refused = forked.holds(check)
    os.kill(pid, signal.SIGKILL)
    forked.wait(pid)
    os.close(ready_r)
    assert refused


def test_report_says_what_holds_and_what_does_not() -> None:
    def check() -> bool:
        libc.prctl(libc.PR_SET_DUMPABLE, 1)
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        for name in process.SCRUBBING_ENVIRONMENT:
            os.environ.pop(name, None)
        weak = process.report(memory_locked=False)
        process.harden("kmsfs-test")
        os.environ.update(process.SCRUBBING_ENVIRONMENT)
        strong = process.report(memory_locked=True)
        return weak == process.ProcessReport(
            undumpable=False, core_limit_zero=False, memory_locked=False, allocator_scrubs=False
        ) and strong == process.ProcessReport(
            undumpable=True, core_limit_zero=True, memory_locked=True, allocator_scrubs=True
        )

    assert forked.holds(check)


def test_locking_everything_locks_what_is_touched_later() -> None:
    def check() -> bool:
        if os.geteuid() != 0:
            return True
        if not process.lock_all_memory():
            return False
        before = locked_kib()
        address = libc.map_anonymous(8 << 20)
        return locked_kib() == before + (8 << 10) and "lo" in mapping_flags(address)

    assert forked.holds(check)


def test_locking_everything_over_the_limit_is_told() -> None:
    def check() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
        forked.become_nobody()
        return not process.lock_all_memory()

    assert forked.holds(check)


def test_the_limit_is_raised_as_far_as_permitted() -> None:
    def check() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 4 << 20))
        forked.become_nobody()
        process.raise_memlock_limit(2 << 20)
        within = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        process.raise_memlock_limit(1 << 20)
        never_lowered = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        process.raise_memlock_limit(64 << 20)
        beyond = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return (within, never_lowered, beyond) == (
            (2 << 20, 4 << 20),
            (2 << 20, 4 << 20),
            (4 << 20, 4 << 20),
        )

    assert forked.holds(check)


def test_the_limit_of_descriptors_is_raised_as_far_as_permitted() -> None:
    def check() -> bool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))
        forked.become_nobody()
        process.raise_descriptor_limit(300)
        within = resource.getrlimit(resource.RLIMIT_NOFILE)
        process.raise_descriptor_limit(250)
        never_lowered = resource.getrlimit(resource.RLIMIT_NOFILE)
        process.raise_descriptor_limit(1024)
        beyond = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (within, never_lowered, beyond) == ((300, 400), (300, 400), (400, 400))

    assert forked.holds(check)


def test_a_daemon_with_all_its_descriptors_has_one_for_each_open_that_may_wait() -> None:
    def check() -> bool:
        process.raise_descriptor_limit(process.DAEMON_DESCRIPTORS)
        enough = process.descriptors_for_ciphertext(at_least=8) >= MAX_WAITING
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
        fewer = process.descriptors_for_ciphertext(at_least=8)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        return enough and fewer == 44 and process.descriptors_for_ciphertext(at_least=8) == 8

    assert forked.holds(check)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    def check() -> bool:
        process.end_with_parent(1 << 30)
        return False

    assert forked.holds(check)


def test_a_child_ends_with_its_parent() -> None:
    pid_r, pid_w = os.pipe()

    def be_parent() -> bool:
        me = os.getpid()

        def be_child() -> bool:
            process.end_with_parent(me)
            os.write(pid_w, str(os.getpid()).encode())
            signal.pause()
            return True

        forked.start(be_child)
        signal.pause()
        return True

    parent = forked.start(be_parent)
    os.close(pid_w)
    child_fd = os.pidfd_open(int(os.read(pid_r, 20)))
    os.kill(parent, signal.SIGKILL)
    assert forked.wait(parent) == -signal.SIGKILL
    poll = select.poll()
    poll.register(child_fd, select.POLLIN)
    assert poll.poll(10_000)
    for fd in (pid_r, child_fd):
        os.close(fd)
