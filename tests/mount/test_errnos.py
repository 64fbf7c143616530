"""Each row of the errno table, through a real mount, in the words of a real program."""

import threading
import time
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.sites import StrictSite

REJECTED = "Key was rejected by service"
REVOKED = "Key has been revoked"
EXPIRED = "Key has expired"
TIMED_OUT = "Connection timed out"
BAD_MESSAGE = "Bad message"


def reason_of(volume: MountedVolume, path: str) -> str:
    """What `kmsfs status` says of a failing file: the error's name."""
    failing = {item["path"]: item["reason"] for item in volume.status()["failing"]}
    name: str = failing[path].partition(":")[0]
    return name


def test_refusal_by_kms_is_key_rejected(strict_site: StrictSite) -> None:
    site = strict_site
    site.write("denied.encrypted", site.blob(site.secret("denied", 40)))
    site.kms.deny(site.kms.admin, "Decrypt", site.key)
    volume = site.mount()
    assert strerror_of_cat(volume.path / "denied") == REJECTED
    assert reason_of(volume, "denied") == "KeyAccessDenied"


def test_file_under_another_key_is_key_rejected(strict_site: StrictSite) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.write("other.encrypted", site.blob(site.secret("other", 40), key_arn=other.arn))
    volume = site.mount()
    assert strerror_of_cat(volume.path / "other") == REJECTED
    assert reason_of(volume, "other") == "IncorrectKey"


def test_message_under_a_key_that_is_not_allowed_never_calls_kms(strict_site: StrictSite) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.make_volume()
    site.encrypt("other", site.secret("other", 40), key_arn=other.arn)
    volume = site.mount()
    site.kms.forget_calls()
    assert strerror_of_cat(volume.path / "other") == REJECTED
    assert reason_of(volume, "other") == "KeyNotAllowed"
    assert site.kms.calls("Decrypt") == []


def test_bare_blobs_try_the_allowed_keys_in_order_and_no_other(strict_site: StrictSite) -> None:
    site = strict_site
    second, third = site.kms.create_key(), site.kms.create_key()
    plaintext = site.secret("second", 40)
    site.write("second.encrypted", site.blob(plaintext, key_arn=second.arn))
    site.write("third.encrypted", site.blob(site.secret("third", 40), key_arn=third.arn))
    volume = site.mount("--key-id", second.arn)
    assert (volume.path / "second").read_bytes() == plaintext
    assert [call.key_id for call in site.kms.calls("Decrypt")] == [site.key_arn, second.arn]
    assert strerror_of_cat(volume.path / "third") == REJECTED


def test_the_key_that_decrypted_a_bare_blob_is_tried_first_the_next_time(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    second = site.kms.create_key()
    site.write("file.encrypted", site.blob(site.secret("file", 40), key_arn=second.arn))
    volume = site.mount("--key-id", second.arn)
    assert strerror_of_cat(volume.path / "file") == ""
    volume.kmsfs("lock", volume.path)
    volume.kmsfs("unlock", volume.path)
    site.kms.forget_calls()
    assert strerror_of_cat(volume.path / "file") == ""
    assert [call.key_id for call in site.kms.calls("Decrypt")] == [second.arn]


def test_any_key_lets_kms_find_the_key_of_a_bare_blob(strict_site: StrictSite) -> None:
    site = strict_site
    other = site.kms.create_key()
    plaintext = site.secret("other", 40)
    site.write("other.encrypted", site.blob(plaintext, key_arn=other.arn))
    volume = site.mount("--any-key", key=None)
    assert (volume.path / "other").read_bytes() == plaintext
    assert site.kms.calls("Decrypt")[-1].key_id is None


@pytest.mark.parametrize("state", ["Disabled", "PendingDeletion"])
def test_unusable_key_is_key_revoked(strict_site: StrictSite, state: str) -> None:
    site = strict_site
    site.write("file.encrypted", site.blob(site.secret("file", 40)))
    if state == "Disabled":
        site.client.disable_key(KeyId=site.key_arn)
    else:
        site.client.schedule_key_deletion(KeyId=site.key_arn, PendingWindowInDays=7)
    volume = site.mount()
    assert strerror_of_cat(volume.path / "file") == REVOKED
    assert reason_of(volume, "file") == "KeyUnusable"


def test_expired_or_missing_credentials_are_key_expired(strict_site: StrictSite) -> None:
    site = strict_site
    site.write("file.encrypted", site.blob(site.secret("file", 40)))
    identity = site.kms.create_identity("expired")
    volume = site.mount(env=site.kms.env(identity))
    identity.expired = True
    assert strerror_of_cat(volume.path / "file") == EXPIRED
    without = {k: v for k, v in site.env.items() if "ACCESS_KEY" not in k}
    bare = site.mount(path=site.directory / "bare", env=without)
    assert strerror_of_cat(bare.path / "file") == EXPIRED
    assert reason_of(bare, "file") == "CredentialsUnavailable"


def test_throttling_past_the_deadline_is_timed_out(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("deadline_s = 2.0\n")
    site.write("file.encrypted", site.blob(site.secret("file", 40)))
    site.kms.fail("ThrottlingException")
    volume = site.mount()
    started = time.monotonic()
    assert strerror_of_cat(volume.path / "file") == TIMED_OUT
    assert time.monotonic() - started < 4.0


@pytest.mark.parametrize(
    "fault",
    [Fault.HANG, Fault.RESET, Fault.ERROR_500, Fault.ERROR_503, Fault.DRIP],
    ids=lambda fault: fault.name,
)
def test_unreachable_kms_is_timed_out_within_the_deadline(
    strict_site: StrictSite, fault_proxy: FaultProxy, fault: Fault
) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("deadline_s = 1.5\n")
    site.write("file.encrypted", site.blob(site.secret("file", 40)))
    fault_proxy.inject(fault, seconds=1.0)
    volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url})
    started = time.monotonic()
    assert strerror_of_cat(volume.path / "file") == TIMED_OUT
    assert time.monotonic() - started < 3.0
    fault_proxy.heal()
    assert strerror_of_cat(volume.path / "file") == ""


@pytest.mark.parametrize(
    "fault",
    [Fault.EMPTY_200, Fault.HTML_200, Fault.TYPES_200, Fault.OTHER_KEY],
    ids=lambda fault: fault.name,
)
def test_answers_that_kms_never_gives_are_an_io_error(
    strict_site: StrictSite, fault_proxy: FaultProxy, fault: Fault
) -> None:
    site = strict_site
    site.write("file.encrypted", site.blob(site.secret("file", 40)))
    fault_proxy.inject(fault)
    volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url})
    assert strerror_of_cat(volume.path / "file") == "Input/output error"
    assert reason_of(volume, "file") == "KmsAnswerInvalid"


def test_altered_truncated_and_extended_ciphertext_is_bad_message(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("blob*")
    whole = site.encrypt("whole", site.secret("whole", 9000)).read_bytes()
    blob = site.blob(site.secret("blob", 40))
    middle = len(whole) // 2
    site.write(
        "flipped.encrypted", whole[:middle] + bytes((whole[middle] ^ 1,)) + whole[middle + 1 :]
    )
    site.write("cut.encrypted", whole[:-1])
    site.write("longer.encrypted", whole + b"\0")
    site.write("blob-flipped.encrypted", blob[:-1] + bytes((blob[-1] ^ 1,)))
    site.write("blob-longer.encrypted", blob + b"\n")
    site.write("empty.encrypted", b"")
    site.write("text.encrypted", b"this was never encrypted\n")
    volume = site.mount()
    for name in ("cut", "longer", "blob-flipped", "empty", "flipped"):
        assert (name, strerror_of_cat(volume.path / name)) == (name, BAD_MESSAGE)
    assert "failed `aws kms encrypt" in str(volume.status()["failing"])
    assert strerror_of_cat(volume.path / "whole") == ""


def test_unbound_file_in_a_volume_is_bad_message_unless_named(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("named")
    plaintext = site.secret("blob", 40)
    for name in ("named", "unnamed"):
        site.write(f"{name}.encrypted", site.blob(plaintext))
    volume = site.mount()
    assert (volume.path / "named").read_bytes() == plaintext
    site.kms.forget_calls()
    assert strerror_of_cat(volume.path / "unnamed") == BAD_MESSAGE
    assert site.kms.calls("Decrypt") == []
    status = volume.status()
    assert status["unbound"] == ["named"]
    assert reason_of(volume, "unnamed") == "NotBound"


def test_file_above_the_limit_is_too_large_and_budget_is_out_of_memory(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config('[cache]\nmax_bytes = "64KiB"\nmax_file_bytes = "40KiB"\n')
    site.encrypt("huge", site.secret("huge", 41 << 10))
    site.encrypt("one", site.secret("one", 40 << 10))
    site.encrypt("two", site.secret("two", 40 << 10))
    volume = site.mount()
    site.kms.forget_calls()
    assert strerror_of_cat(volume.path / "huge") == "File too large"
    assert site.kms.calls("Decrypt") == []
    with (volume.path / "one").open("rb"):
        assert strerror_of_cat(volume.path / "two") == "Cannot allocate memory"
    # Once nobody has it open it makes room.
    assert strerror_of_cat(volume.path / "two") == ""
    assert [entry["path"] for entry in volume.status()["cached"]] == ["two"]


def test_wrong_encryption_context_is_bad_message(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("context", 40)
    site.write("file.encrypted", site.blob(plaintext, service="web"))
    right = site.mount("--encryption-context", "service=web")
    assert (right.path / "file").read_bytes() == plaintext
    wrong = site.mount("--encryption-context", "service=db", path=site.directory / "wrong")
    assert strerror_of_cat(wrong.path / "file") == BAD_MESSAGE


def test_any_number_of_readers_share_one_decryption(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("shared", 3000)
    site.write("shared.encrypted", site.blob(plaintext))
    site.key.latency_s = 0.5
    volume = site.mount()
    found: list[bytes] = []
    readers = [
        threading.Thread(target=lambda: found.append((volume.path / "shared").read_bytes()))
        for _ in range(32)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [plaintext] * 32
    assert len(site.kms.calls("Decrypt")) == 1


def test_a_slow_key_leaves_files_of_other_keys_alone(strict_site: StrictSite) -> None:
    site = strict_site
    slow = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, slow.arn))
    for number in range(12):
        site.encrypt(f"slow-{number}", site.secret(f"slow {number}", 100), key_arn=slow.arn)
    fast = site.secret("fast", 100)
    site.encrypt("fast", fast)
    slow.latency_s = 1.5
    volume = site.mount()
    readers = [
        threading.Thread(target=strerror_of_cat, args=(volume.path / f"slow-{number}",))
        for number in range(12)
    ]
    for reader in readers:
        reader.start()
    wait_until(lambda: len(volume.status()["worker_pids"]) == 4, "four calls are under way")
    started = time.monotonic()
    assert (volume.path / "fast").read_bytes() == fast
    assert time.monotonic() - started < 1.0
    for reader in readers:
        reader.join()


def test_source_that_vanishes_is_an_error_of_its_files_only(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    path = site.encrypt("sub/key", site.secret("key", 100))
    site.encrypt("other", site.secret("other", 100))
    volume = site.mount()
    assert strerror_of_cat(volume.path / "sub/key") == ""
    path.unlink()
    Path(path.parent).rmdir()
    wait_until(
        lambda: strerror_of_cat(volume.path / "sub/key") == "No such file or directory",
        "it is gone",
        2.0,
    )
    assert strerror_of_cat(volume.path / "other") == ""
