"""Makes trouble: kills processes, has KMS fail, locks and unlocks."""

import collections
import contextlib
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from kmsfs.admin import control
from tests.chaos.files import ChaosFile
from tests.chaos.mounted import ChaosMount, send
from tests.chaos.table import Table
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

# The launcher gives up after more deaths of daemons than 5 within a minute.
_MAX_DEATHS = 4
_DEATH_WINDOW_S = 62.0

# Of faults that take time, in seconds.
_FAULT_S = {Fault.DELAY: 0.4, Fault.DRIP: 0.01}


class Troublemaker:
    """Makes trouble at random, one thing after the other, and mends it again.

    Args:
        pause_s: between two troubles, on average.
    """

    def __init__(self, seed: str, pause_s: float) -> None:
        self._chance = random.Random(seed)
        self._pause_s = pause_s
        self._pause = select.poll()
        self.done: collections.Counter[str] = collections.Counter()

    def run(self, ends_at: float) -> None:
        """Make trouble until a moment (of time.monotonic); none is left then."""
        while True:
            self._rest(self._chance.expovariate(1 / self._pause_s))
            if time.monotonic() >= ends_at:
                return
            self._make_one()

    def _make_one(self) -> None:
        raise NotImplementedError

    def _rest(self, seconds: float) -> None:
        self._pause.poll(seconds * 1000)


class Killer(Troublemaker):
    """Kills or stops one process at a time.

    Args:
        rollback_guard: held while the mount must not forget what it has seen: a daemon that is
            killed does. None where the files themselves remember it.
    """

    def __init__(
        self,
        mount: ChaosMount,
        table: Table,
        *,
        seed: str,
        pause_s: float,
        rollback_guard: "threading.Lock | None",
    ) -> None:
        super().__init__(seed, pause_s)
        self._mount = mount
        self._table = table
        self._rollback_guard = rollback_guard
        self._deaths: list[float] = []

    def _make_one(self) -> None:
        ways: dict[Callable[[], None], int] = {
            self._kill_worker: 40,
            self._stop_worker: 10,
            self._kill_zygote: 20,
            self._stop_daemon: 10,
            self._kill_daemon: 20,
            self._kill_launcher: 6,
        }
        (way,) = self._chance.choices(list(ways), list(ways.values()))
        way()

    def _kill_worker(self) -> None:
        self._kill_one("kmsfs-worker")

    def _kill_zygote(self) -> None:
        self._kill_one("kmsfs-zygote")

    def _kill_one(self, name: str) -> None:
        pids = self._mount.pids(name)
        if pids and send(self._chance.choice(pids), signal.SIGKILL):
            self.done[f"kills of {name}"] += 1

    def _stop_worker(self) -> None:
        self._stop_one("kmsfs-worker", 1.5)

    def _stop_daemon(self) -> None:
        self._stop_one("kmsfs-daemon", 0.4)

    def _stop_one(self, name: str, longest_s: float) -> None:
        pids = self._mount.pids(name)
        if not pids:
            return
        pid = self._chance.choice(pids)
        if send(pid, signal.SIGSTOP):
            self.done[f"stops of {name}"] += 1
            self._rest(self._chance.uniform(0.05, longest_s))
            send(pid, signal.SIGCONT)

    def _kill_daemon(self) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < _DEATH_WINDOW_S]
        if len(self._deaths) >= _MAX_DEATHS:
            return
        with self._forgetting() as may, self._daemon_away(may=may):
            if may:
                self._deaths.append(now)
                self._mount.kill_daemon()
                self.done["kills of kmsfs-daemon"] += 1

    def _kill_launcher(self) -> None:
        with self._forgetting() as may, self._daemon_away(may=may):
            if may:
                self._mount.kill_launcher()
                self._deaths.clear()
                self.done["kills of kmsfs-launcher"] += 1

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[bool]:
        """Whether the mount may forget which versions it has seen."""
        guard = self._rollback_guard
        if guard is None:
            yield True
        elif guard.acquire(timeout=5.0):
            try:
                yield True
            finally:
                guard.release()
        else:
            yield False

    @contextlib.contextmanager
    def _daemon_away(self, *, may: bool) -> Iterator[None]:
        if not may:
            yield
            return
        self._table.daemon.begin()
        yield
        self._table.daemon.end()


class Outages(Troublemaker):
    """Has KMS be away, answer nonsense, be slow, or say no."""

    def __init__(
        self,
        kms: StrictKms,
        keys: list[KmsKey],
        proxy: FaultProxy,
        table: Table,
        *,
        seed: str,
        pause_s: float,
    ) -> None:
        super().__init__(seed, pause_s)
        self._kms = kms
        self._keys = keys
        self._proxy = proxy
        self._table = table

    def _make_one(self) -> None:
        ways: dict[Callable[[KmsKey | None], str], int] = {
            self._fault: 60,
            self._refuse: 8,
            self._disable: 10,
            self._deny: 8,
            self._fail: 8,
            self._slow: 6,
        }
        (way,) = self._chance.choices(list(ways), list(ways.values()))
        self._table.kms.begin()
        name = way(self._chance.choice([*self._keys, None]))
        self.done[f"outages: {name}"] += 1
        self._rest(self._chance.uniform(0.1, 2.5))
        self._heal()
        self._table.kms.end()

    def _fault(self, key: KmsKey | None) -> str:
        fault = self._chance.choice(list(Fault))
        self._proxy.inject(fault, key_id=key.arn if key else None, seconds=_FAULT_S.get(fault, 0.0))
        return fault.name

    def _refuse(self, _key: KmsKey | None) -> str:
        self._proxy.refuse()
        return "connections refused"

    def _disable(self, key: KmsKey | None) -> str:
        state = self._chance.choice(["Disabled", "PendingDeletion"])
        for one in [key] if key else self._keys:
            one.state = state
        return f"keys {state}"

    def _deny(self, key: KmsKey | None) -> str:
        self._kms.deny(self._kms.admin, "Decrypt", key)
        return "access denied"

    def _fail(self, key: KmsKey | None) -> str:
        code = self._chance.choice(["ThrottlingException", "KMSInternalException"])
        self._kms.fail(code, key=key)
        return code

    def _slow(self, _key: KmsKey | None) -> str:
        self._kms.latency_s = self._chance.uniform(0.05, 1.0)
        return "slow answers"

    def _heal(self) -> None:
        self._proxy.heal()
        self._proxy.accept()
        for key in self._keys:
            key.state = "Enabled"
        for denied in [*self._keys, None]:
            self._kms.allow(self._kms.admin, "Decrypt", denied)
        self._kms.heal()
        self._kms.forget_calls()


class Operator(Troublemaker):
    """Locks, unlocks, refreshes and looks, as a person does.

    Args:
        rollback_guard: as `Killer` has it; here for a lock.
    """

    def __init__(
        self,
        mount: ChaosMount,
        files: list[ChaosFile],
        table: Table,
        *,
        seed: str,
        pause_s: float,
        rollback_guard: "threading.Lock | None",
    ) -> None:
        super().__init__(seed, pause_s)
        self._mount = mount
        self._files = files
        self._table = table
        self._rollback_guard = rollback_guard

    def _make_one(self) -> None:
        kind = self._chance.choices(["lock", "refresh", "why", "status"], [40, 30, 10, 20])[0]
        path = self._chance.choice([file.name for file in self._files] + ["", "tls", "legacy"])
        match kind:
            case "lock":
                self._lock()
            case "refresh":
                self._mount.ask(control.RefreshRequest(path=path))
                self.done["refreshes"] += 1
            case "why":
                self._mount.ask(control.WhyRequest(path=path))
            case "status":
                self._mount.status()

    def _lock(self) -> None:
        guard = self._rollback_guard
        if guard is not None and not guard.acquire(timeout=5.0):
            return
        try:
            self._table.lock.begin()
            before = self._mount.launcher_changes
            was_locked = self._mount.ask(control.LockRequest()) is not None
            self._rest(self._chance.uniform(0.0, 0.8))
            status = self._mount.status()
            # Another launcher has mounted anew, which unlocks.
            same_launcher = before % 2 == 0 and before == self._mount.launcher_changes
            self._mount.unlock()
            self._table.lock.end()
            if was_locked and same_launcher and status is not None:
                assert status.locked, "it is not locked any more, and nobody unlocked it"
            self.done["locks"] += 1
        finally:
            if guard is not None:
                guard.release()
