"""All faults of the matrix, in the order of the table that is made of them."""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from tests.fault.matrix.fault import Fault, Group, Shown, Spared
from tests.fault.matrix.stage import BUDGET_BYTES, DEADLINE_S, MAX_FILE_BYTES, Scene
from tests.support import fault_proxy
from tests.support.canary import secret
from tests.support.mounts import wait_gone, wait_until

# --- KMS is away ---------------------------------------------------------------------------------


def away(name: str, of_proxy: fault_proxy.Fault, *, seconds: float = 0.0) -> Fault:
    """KMS gives no answer, to anybody."""
    return Fault(
        name=name,
        errno="ETIMEDOUT",
        reason="KmsUnreachable",
        ramfs=Shown.KEPT,
        spared=Spared.IN_MEMORY,
        strike=lambda scene: scene.stage.proxy.inject(of_proxy, seconds=seconds),
        mend=heal,
    )


def nonsense(name: str, of_proxy: fault_proxy.Fault) -> Fault:
    """Something in the place of KMS answers what KMS never answers."""
    return Fault(
        name=name,
        errno="EIO",
        reason="KmsAnswerInvalid",
        ramfs=Shown.KEPT,
        spared=Spared.IN_MEMORY,
        strike=lambda scene: scene.stage.proxy.inject(of_proxy),
        mend=heal,
    )


def failing(name: str, code: str, reason: str) -> Fault:
    """KMS answers that it cannot."""
    return Fault(
        name=name,
        errno="ETIMEDOUT",
        reason=reason,
        ramfs=Shown.KEPT,
        strike=lambda scene: scene.site.kms.fail(code, operation="Decrypt", key=scene.site.key),
        mend=heal,
    )


def heal(scene: Scene) -> None:
    """KMS and the way to it are as they should be."""
    scene.stage.proxy.heal()
    scene.site.kms.heal()


KMS_AWAY = Group(
    "KMS cannot be reached, or cannot answer",
    (
        away("it takes requests and answers none", fault_proxy.Fault.HANG),
        away("its answer drips in, a byte a second", fault_proxy.Fault.DRIP, seconds=1.0),
        away("its answer comes after the deadline", fault_proxy.Fault.DELAY, seconds=30.0),
        Fault(
            name="connections are refused",
            errno="ETIMEDOUT",
            reason="KmsUnreachable",
            ramfs=Shown.KEPT,
            spared=Spared.IN_MEMORY,
            strike=lambda scene: scene.stage.proxy.refuse(),
            mend=lambda scene: scene.stage.proxy.accept(),
        ),
        away("connections are reset", fault_proxy.Fault.RESET),
        away("connections are closed", fault_proxy.Fault.CLOSE),
        away("connections are reset within the answer", fault_proxy.Fault.RESET_LATE),
        away("status 500 in HTML", fault_proxy.Fault.ERROR_500),
        away("status 503, empty", fault_proxy.Fault.ERROR_503),
        away("bytes that are no HTTP", fault_proxy.Fault.NOT_HTTP),
        failing("it throttles", "ThrottlingException", "KmsUnreachable"),
        failing("it fails inside", "KMSInternalException", "KmsUnreachable"),
        failing(
            "the key is not ready (KeyUnavailable)", "KeyUnavailableException", "KmsUnreachable"
        ),
        nonsense("a captive portal: status 200 in HTML", fault_proxy.Fault.HTML_200),
        nonsense("a company's proxy: status 403 in HTML", fault_proxy.Fault.FORBIDDEN_403),
        nonsense("status 200 and {}", fault_proxy.Fault.EMPTY_200),
        nonsense("status 200, fields of other types", fault_proxy.Fault.TYPES_200),
        nonsense("half an answer", fault_proxy.Fault.TRUNCATE),
        nonsense("an answer of other bytes", fault_proxy.Fault.GARBLE),
        nonsense("an answer of another key", fault_proxy.Fault.OTHER_KEY),
    ),
)

# --- KMS says no ---------------------------------------------------------------------------------


def set_key_state(state: str) -> Callable[[Scene], None]:
    """Have the site's key in a KeyState of the service model."""

    def set_state(scene: Scene) -> None:
        scene.site.key.state = state

    return set_state


def deny(scene: Scene) -> None:
    scene.site.kms.deny(scene.stage.identity, "Decrypt", scene.site.key)


def allow(scene: Scene) -> None:
    scene.site.kms.allow(scene.stage.identity, "Decrypt", scene.site.key)


def expire(scene: Scene, *, expired: bool) -> None:
    scene.stage.identity.expired = expired


KMS_REFUSES = Group(
    "KMS or the allow-list says no",
    (
        Fault(
            name="the role is denied, or its grant revoked",
            errno="EKEYREJECTED",
            reason="KeyAccessDenied",
            ramfs=Shown.ABSENT,
            strike=deny,
            mend=allow,
        ),
        Fault(
            name="the key is disabled",
            errno="EKEYREVOKED",
            reason="KeyUnusable",
            ramfs=Shown.ABSENT,
            strike=set_key_state("Disabled"),
            mend=set_key_state("Enabled"),
        ),
        Fault(
            name="the key is pending deletion",
            errno="EKEYREVOKED",
            reason="KeyUnusable",
            ramfs=Shown.ABSENT,
            strike=set_key_state("PendingDeletion"),
            mend=set_key_state("Enabled"),
        ),
        Fault(
            name="a message under a key that is not allowed",
            errno="EKEYREJECTED",
            reason="KeyNotAllowed",
            ramfs=Shown.ABSENT,
            alter=lambda scene, _: scene.site.seal(
                scene.path, secret("foreign", 3000), key_arn=scene.stage.foreign_key.arn
            ),
            mend=lambda scene: scene.put(scene.next_version()),
        ),
        Fault(
            name="a bare blob under none of the allowed keys",
            errno="EKEYREJECTED",
            reason="IncorrectKey",
            ramfs=Shown.ABSENT,
            unbound=True,
            alter=lambda scene, _: scene.stage.foreign_key.seal(secret("foreign", 300), {}),
        ),
        Fault(
            name="the credentials have expired and cannot be refreshed",
            errno="EKEYEXPIRED",
            reason="CredentialsUnavailable",
            ramfs=Shown.KEPT,
            spared=Spared.IN_MEMORY,
            strike=functools.partial(expire, expired=True),
            mend=functools.partial(expire, expired=False),
        ),
    ),
)

# --- the ciphertext ------------------------------------------------------------------------------


def bad(name: str, alter: Callable[[Scene, bytes], bytes], reason: str, **more: bool) -> Fault:
    """The ciphertext that takes the file's place is not what it should be."""
    return Fault(
        name=name,
        errno="EBADMSG",
        reason=reason,
        ramfs=Shown.ABSENT,
        alter=alter,
        unbound=more.get("unbound", False),
    )


def flip(_scene: Scene, ciphertext: bytes) -> bytes:
    """One bit, in the middle."""
    at = len(ciphertext) // 2
    return ciphertext[:at] + bytes((ciphertext[at] ^ 1,)) + ciphertext[at + 1 :]


def of_another_place(scene: Scene, _ciphertext: bytes) -> bytes:
    """A good message that belongs to another path of the volume."""
    return scene.site.seal("elsewhere", secret("elsewhere", 3000))


def older(scene: Scene, _ciphertext: bytes) -> bytes:
    """The version that is served, once a newer one than the next has been seen."""
    before = scene.ciphertext.read_bytes()
    scene.put(scene.next_version())
    scene.recovered_after_s()
    return before


def altered_blob(scene: Scene, _ciphertext: bytes) -> bytes:
    """A bare blob with another last byte."""
    blob = scene.site.blob(secret("blob", 300))
    return blob[:-1] + bytes((blob[-1] ^ 1,))


def write_in_place(scene: Scene, ciphertext: bytes) -> None:
    """As a careless editor does: half of it by now."""
    with scene.ciphertext.open("r+b") as file:
        file.truncate(0)
        file.write(ciphertext[: len(ciphertext) // 2])


CIPHERTEXT = Group(
    "The ciphertext is not what it should be",
    (
        bad("one bit differs", flip, "CiphertextInvalid"),
        bad("the end is missing", lambda _, whole: whole[:-1], "CiphertextInvalid"),
        bad("bytes follow its end", lambda _, whole: whole + b"\0", "CiphertextInvalid"),
        bad("a bare blob, one byte differs", altered_blob, "CiphertextInvalid", unbound=True),
        bad("it is empty", lambda _, __: b"", "CiphertextInvalid"),
        bad(
            "it was never encrypted",
            lambda _, __: b"plain words\n" * 9,
            "CiphertextInvalid",
            unbound=True,
        ),
        Fault(
            name="it is half written, in place",
            errno="EBADMSG",
            reason="CiphertextInvalid",
            ramfs=Shown.ABSENT,
            put=write_in_place,
        ),
        bad("it belongs to another path", of_another_place, "ContextMismatch"),
        bad(
            "it is not bound, where that is required",
            lambda scene, _: scene.site.blob(secret("blob", 300)),
            "NotBound",
        ),
        Fault(
            name="an older version is put back",
            errno="EBADMSG",
            reason="RolledBack",
            ramfs=Shown.ABSENT,
            alter=older,
            mend=lambda scene: scene.put(scene.next_version()),
        ),
        Fault(
            name="it is larger than max_file_bytes",
            errno="EFBIG",
            reason="FileTooLarge",
            ramfs=Shown.ABSENT,
            alter=lambda scene, _: scene.site.seal(scene.path, secret("huge", MAX_FILE_BYTES + 1)),
            mend=lambda scene: scene.put(scene.next_version()),
        ),
    ),
)

# --- the source ----------------------------------------------------------------------------------


def replaced(name: str, make: Callable[[Path, bytes], None]) -> Fault:
    """Something that is no file, or leads to none, takes the ciphertext's place."""

    def put(scene: Scene, ciphertext: bytes) -> None:
        scene.ciphertext.unlink()
        make(scene.ciphertext, ciphertext)

    return Fault(name=name, errno="ENOENT", reason="", ramfs=Shown.ABSENT, put=put)


def link_out(path: Path, ciphertext: bytes) -> None:
    """To good ciphertext, outside of the source."""
    outside = path.parents[2] / "outside"
    outside.write_bytes(ciphertext)
    path.symlink_to(outside)


def claim_name_twice(scene: Scene) -> None:
    rival = scene.ciphertext.with_suffix(".kms")
    scene.site.replace(str(rival.relative_to(scene.site.source)), scene.ciphertext.read_bytes())


def stall(scene: Scene) -> None:
    assert scene.stage.stalling is not None
    scene.stage.stalling.stall()


def go_on(scene: Scene) -> None:
    assert scene.stage.stalling is not None
    scene.stage.stalling.go_on()


SOURCE = Group(
    "The source",
    (
        replaced("the file is removed", lambda *_: None),
        replaced("a symbolic link out of the source", link_out),
        replaced("a symbolic link to itself", lambda path, _: path.symlink_to(path.name)),
        replaced("a FIFO that nobody writes to", lambda path, _: os.mkfifo(path)),
        replaced("a directory", lambda path, _: path.mkdir()),
        Fault(
            name="two files for one name",
            errno="ENOTUNIQ",
            reason="NameConflict",
            ramfs=Shown.ABSENT,
            strike=claim_name_twice,
            mend=lambda scene: scene.ciphertext.with_suffix(".kms").unlink(),
        ),
        Fault(
            name="a network filesystem that stalls",
            errno="ETIMEDOUT",
            reason=None,
            ramfs=Shown.KEPT,
            spared=Spared.NOTHING,
            stalling=True,
            strike=stall,
            mend=go_on,
        ),
    ),
)

# --- memory --------------------------------------------------------------------------------------

# They leave less than the file needs, as other files take some too.
_FILLERS = BUDGET_BYTES // MAX_FILE_BYTES - 1


def fill_memory(scene: Scene) -> None:
    """Have the budget full: of files that are open or, in a ramfs, of files that are there."""
    for number in range(_FILLERS):
        name = f"filler-{number}"
        content = secret(name, MAX_FILE_BYTES)
        path = scene.site.encrypt(name, content)
        scene.ends.callback(path.unlink, missing_ok=True)
        served = scene.stage.volume.path / name
        wait_until(served.exists, f"{name} is there", 10.0)
        if scene.stage.view == "fuse":
            fd = os.open(served, os.O_RDONLY)
            scene.ends.callback(os.close, fd)
        assert served.read_bytes() == content


MEMORY = Group(
    "Memory",
    (
        Fault(
            name="the budget is full of open files (ramfs: of files)",
            errno="ENOMEM",
            reason="LockedMemoryExhausted",
            ramfs=Shown.ABSENT,
            spared=Spared.IN_MEMORY,
            strike=fill_memory,
            size_bytes=MAX_FILE_BYTES,
            mend=lambda scene: scene.ends.close(),
        ),
    ),
)

# --- processes -----------------------------------------------------------------------------------


def while_decrypting(strike: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """Strike once KMS has been asked for the new version, which it takes its time to answer."""

    def prepare(scene: Scene) -> None:
        scene.site.key.latency_s = 0.4
        asked = scene.stage.proxy.requests

        def during() -> None:
            scene.stage.proxy.wait_for_requests(asked + 1, 20.0)
            strike(scene)

        scene.during = during

    return prepare


def signal_each(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_workers(scene: Scene) -> None:
    signal_each(scene.stage.volume.workers(), signal.SIGKILL)


def kill_every_worker(scene: Scene) -> None:
    """For as long as the open may take, whichever comes up."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.05)):
        kill_workers(scene)
        pause.wait(0.05)


def stop_workers(scene: Scene) -> None:
    pids = scene.stage.volume.workers()
    signal_each(pids, signal.SIGSTOP)
    scene.ends.callback(signal_each, pids, signal.SIGKILL)
    make_kms_quick(scene)


def kill_zygote(scene: Scene) -> None:
    pid = scene.stage.zygote_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def kill_daemon(scene: Scene) -> None:
    pid = scene.stage.daemon_pid()
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


def make_kms_quick(scene: Scene) -> None:
    scene.site.key.latency_s = 0.0


PROCESSES = Group(
    "Processes of kmsfs, while the file is decrypted",
    (
        Fault(
            name="the worker is killed",
            errno="",
            reason="",
            ramfs=Shown.SERVED,
            strike=while_decrypting(kill_workers),
            mend=make_kms_quick,
        ),
        Fault(
            name="every worker is killed",
            errno="EIO",
            reason="WorkerFailed",
            ramfs=Shown.KEPT,
            spared=Spared.IN_MEMORY,
            strike=while_decrypting(kill_every_worker),
            mend=make_kms_quick,
        ),
        Fault(
            name="the worker is stopped",
            errno="",
            reason="",
            ramfs=Shown.SERVED,
            strike=while_decrypting(stop_workers),
            mend=make_kms_quick,
        ),
        Fault(
            name="the zygote is killed",
            errno="",
            reason="",
            ramfs=Shown.SERVED,
            strike=while_decrypting(kill_zygote),
            mend=make_kms_quick,
        ),
        Fault(
            name="the daemon is killed",
            errno="ECONNABORTED",
            reason=None,
            ramfs=Shown.SERVED,
            spared=Spared.NOTHING,
            strike=while_decrypting(kill_daemon),
            mend=make_kms_quick,
        ),
        Fault(
            name="the volume is locked",
            errno="ENOKEY",
            reason="",
            ramfs=Shown.ABSENT,
            spared=Spared.NOTHING,
            strike=lambda scene: scene.stage.lock(),
            mend=lambda scene: scene.stage.unlock(),
        ),
    ),
)

GROUPS = (KMS_AWAY, KMS_REFUSES, CIPHERTEXT, SOURCE, MEMORY, PROCESSES)
