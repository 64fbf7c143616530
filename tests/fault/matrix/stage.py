"""Where the faults of the matrix are made: one mount of each view that lives through all of them.

That no fault leaves anything behind, and that each is recovered from without a remount, shows in
the mount being as good for the last fault as for the first.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmsfs.admin import control
from kmsfs.views import mountpoint as mounts
from tests.support import leftovers
from tests.support.canary import secret
from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import (
    MountedVolume,
    Mounter,
    process_name,
    processes_of,
    wait_until,
)
from tests.support.process_facts import locked_kib
from tests.support.sites import StrictSite
from tests.support.stalling_filesystem import StallingFilesystem, stalling_filesystem
from tests.support.strict_identities import Identity
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

DEADLINE_S = 2.0
"""`deadline_s` of the mounts: an open ends within it, and takes no longer than a hang can show."""

BUDGET_BYTES = 512 << 10
MAX_FILE_BYTES = 64 << 10

# More than these is a hang, not a slow machine.
_OPEN_S = DEADLINE_S + 20.0
_RECOVERED_S = 20.0


@dataclass(frozen=True)
class Opened:
    """How an open, with a read of everything, ended.

    Attributes:
        error: the errno's name; empty if it was read.
    """

    error: str
    content: bytes = field(repr=False)
    seconds: float


def open_and_read(path: Path) -> Opened:
    """Open a file and read it whole.

    Raises:
        AssertionError: it hangs.
    """
    ended: list[Opened] = []

    def read() -> None:
        started = time.monotonic()
        error, content = "", b""
        try:
            content = path.read_bytes()
        except OSError as caught:
            error = errno.errorcode[caught.errno or 0]
        ended.append(Opened(error, content, time.monotonic() - started))

    # A program inside open(2) cannot be interrupted.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(_OPEN_S)
    assert ended, f"an open of {path.name} hangs"
    return ended[0]


@dataclass
class Kept:
    """What a mount has and is while nothing is the matter with it and it is locked."""

    locked_kib: int
    fd_count: int
    mount_count: int
    processes: tuple[str, ...]


@dataclass
class Stage:
    """One mount, and everything around it that faults are made of.

    Attributes:
        identity: who asks KMS in the mount; the site's own client is somebody else.
        other_key: for files that a fault of the site's key must leave alone.
        foreign_key: that the mount does not allow.
        stalling: what shows the source to the mount, where it is to stall.
    """

    view: str
    site: StrictSite
    proxy: FaultProxy
    identity: Identity
    other_key: KmsKey
    foreign_key: KmsKey
    volume: MountedVolume
    stalling: StallingFilesystem | None
    kept: Kept = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.kept = Kept(0, 0, 0, ())
        self.lock()
        try:
            wait_until(self._is_quiet, "zygote and workers have ended")
            self.kept = self.look()
        finally:
            self.unlock()

    def ask(self, request: control.Request) -> control.Answer:
        """Say something on the mount's control socket."""
        mount = self.volume.mount
        assert mount is not None
        return control.call(mount.device, os.geteuid(), request)

    def lock(self) -> None:
        """`kmsfs lock`."""
        assert isinstance(self.ask(control.LockRequest()), control.Locked)

    def unlock(self) -> None:
        """`kmsfs unlock`."""
        assert isinstance(self.ask(control.UnlockRequest()), control.Unlocked)

    def daemon_pid(self) -> int:
        """Process id of the daemon."""
        pid: int = self.volume.status()["daemon_pid"]
        return pid

    def zygote_pid(self) -> int | None:
        """Process id of the zygote, if there is one."""
        pid: int | None = self.volume.status()["zygote_pid"]
        return pid

    def look(self) -> Kept:
        """Look at a mount that is locked."""
        pid = self.daemon_pid()
        own = [
            m for m in mounts.mount_table() if m.mountpoint.startswith(f"{self.site.directory}/")
        ]
        names = sorted(process_name(pid) for pid in processes_of(self.volume.path))
        fds = os.listdir(f"/proc/{pid}/fd")
        return Kept(locked_kib(pid), len(fds), len(own), tuple(filter(None, names)))

    def assert_nothing_leaked(self) -> None:
        """Locked, the mount has the descriptors, bytes and processes that it began with."""
        self.lock()
        try:
            wait_until(lambda: self.look() == self.kept, f"{self.look()} is {self.kept}", 10.0)
        finally:
            self.unlock()

    def _is_quiet(self) -> bool:
        return self.look().processes == ("kmsfs-daemon", "kmsfs-launcher")


@dataclass
class Scene:
    """Files of one fault on a stage; `struck` is the one that the fault is about.

    Attributes:
        path: of `struck`, relative to the mount.
        old: what was served as `struck` before the fault.
        newest: what it is to be at last.
        during: set by a fault that strikes while `struck` is decrypted: waits for that, in a
            thread.
        ends: closed when the scene is over.
    """

    stage: Stage
    path: str
    old: bytes = field(repr=False)
    newest: bytes = field(repr=False)
    during: Callable[[], None] | None = None
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def site(self) -> StrictSite:
        """Shorthand."""
        return self.stage.site

    @property
    def served(self) -> Path:
        """`struck` in the mount."""
        return self.stage.volume.path / self.path

    @property
    def ciphertext(self) -> Path:
        """`struck` in the source."""
        return self.site.source / f"{self.path}.encrypted"

    def next_version(self, size_bytes: int = 3000) -> bytes:
        """Ciphertext of a new version, which is to be put in its place."""
        label = f"{self.path} {self.site.versions.get(self.path, 0) + 1}"
        self.newest = secret(label, size_bytes)
        return self.site.seal(self.path, self.newest)

    def put(self, ciphertext: bytes) -> None:
        """Put bytes in the place of `struck`'s ciphertext, by rename."""
        self.site.replace(f"{self.path}.encrypted", ciphertext)

    def reason(self) -> str:
        """The error that `kmsfs status` names for `struck`; empty if none."""
        status = self.stage.volume.status()
        stale = status["ram"]["stale"] if status["ram"] else []
        reasons = {item["path"]: item["reason"] for item in (*status["failing"], *stale)}
        return str(reasons.get(self.path, "")).partition(":")[0]

    @contextlib.contextmanager
    def striking(self) -> Iterator[None]:
        """Around everything that is struck by what is to happen `during` it."""
        if self.during is None:
            yield
            return
        striker = threading.Thread(target=self.during)
        striker.start()
        try:
            yield
        finally:
            striker.join()

    def recovered_after_s(self) -> float:
        """Wait until the newest version of `struck` is served."""
        started = time.monotonic()
        wait_until(
            lambda: open_and_read(self.served).content == self.newest,
            f"{self.path} is served again",
            _RECOVERED_S,
        )
        return time.monotonic() - started


@contextlib.contextmanager
def scene_on(stage: Stage, *, unbound: bool) -> Iterator[Scene]:
    """A file that is served; gone in the end.

    Args:
        unbound: its directory is one whose files need not be bound.
    """
    stage.count += 1
    path = f"{'unbound' if unbound else 'bound'}-{stage.count}/struck"
    scene = Scene(stage, path, b"", b"")
    scene.put(scene.next_version())
    scene.old = scene.newest
    scene.recovered_after_s()
    with scene.ends:
        yield scene
    shutil.rmtree(scene.ciphertext.parent)
    gone = stage.volume.path / Path(path).parent
    wait_until(lambda: not gone.exists(), "the files of the fault are gone", 10.0)


@contextlib.contextmanager
def set_up(view: str, *, stalling: bool = False) -> Iterator[Stage]:
    """Mount a new stage; everything of it is gone in the end.

    Args:
        stalling: put its source on a filesystem that can be told to stall.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="kmsfs-test-", dir="/run"))
        stack.callback(shutil.rmtree, directory)
        kms = stack.enter_context(StrictKms())
        proxy = stack.enter_context(FaultProxy(kms.endpoint_url))
        key, other, foreign = (kms.create_key() for _ in range(3))
        identity = kms.create_identity("machine")
        mounter = Mounter(kms.env(identity, AWS_ENDPOINT_URL=proxy.endpoint_url), view)
        site = StrictSite(directory, mounter.env, key.arn, kms.client(), mounter, kms, key)
        site.source.mkdir()
        site.make_volume("unbound-*/**", key_ids=(key.arn, other.arn))
        site.append_config(
            f"deadline_s = {DEADLINE_S}\n[cache]\nmax_bytes = {BUDGET_BYTES}\n"
            f"max_file_bytes = {MAX_FILE_BYTES}\n"
        )
        source, filesystem = site.source, None
        if stalling:
            source = directory / "remote"
            source.mkdir()
            filesystem = stack.enter_context(stalling_filesystem(site.source, source))
        stack.callback(_end, mounter, kms, proxy, filesystem)
        volume = mounter.mount(source, directory / "mnt")
        for pid in processes_of(volume.path):
            leftovers.keep(pid)
        yield Stage(view, site, proxy, identity, other, foreign, volume, filesystem)


def _end(
    mounter: Mounter, kms: StrictKms, proxy: FaultProxy, filesystem: StallingFilesystem | None
) -> None:
    kms.heal()
    proxy.heal()
    if filesystem is not None:
        filesystem.go_on()
    assert mounter.clean_up() == []
