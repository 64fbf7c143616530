"""Everything that can go wrong, one class per thing that happened.

Each leaf fixes three answers: the errno that a program reading through a mount gets, the exit
code of a command, and the hint that tells a person what to do. The class name, in the form of
`code`, crosses process boundaries in place of the exception.

Details hold identifiers, sizes and names of errors; never content, neither plaintext nor
ciphertext nor credentials.
"""

import enum
import errno
from typing import ClassVar, Final

from kmsfs.kms_call import KmsCall


class ExitCode(enum.IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    SOME_FAILED = 1
    USAGE = 2
    NOT_AUTHENTIC = 3
    REFUSED_BY_KMS = 4
    KMS_UNAVAILABLE = 5
    GUARANTEE_NOT_MET = 6
    MOUNTPOINT = 7
    MOUNT_HELPER_FAILED = 32
    BUG = 70


class KmsfsError(Exception):
    """Root of all errors that kmsfs raises on purpose.

    Args:
        detail: what happened, for a person: identifiers, sizes, paths; never content.
        hint: replaces the class's own hint where the raiser knows better.

    `call` is the request to KMS that ended so, if one was made or about to be.
    `again_in_s` says, where KMS was not asked since it is away, when it may be.
    """

    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[ExitCode] = ExitCode.BUG
    hint: str = ""
    call: KmsCall | None = None
    again_in_s: float | None = None

    def __init__(self, detail: str, *, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail: Final = detail
        if hint is not None:
            self.hint = hint

    @property
    def code(self) -> str:
        """Name of this error in frames, logs and `status`."""
        return type(self).__name__


# --- usage and configuration -------------------------------------------------------------------


class UsageInvalid(KmsfsError):
    """The command line asks for something that makes no sense."""

    errno = errno.EINVAL
    exit_code = ExitCode.USAGE


class OutputExists(KmsfsError):
    """The output is there already."""

    errno = errno.EEXIST
    exit_code = ExitCode.USAGE
    hint = "add --force to replace it"


class InputUnreadable(KmsfsError):
    """A file named on the command line cannot be read or is of the wrong kind."""

    errno = errno.EIO
    exit_code = ExitCode.USAGE


class OutputUnwritable(KmsfsError):
    """The output cannot be written; nothing was left behind."""

    errno = errno.EIO
    exit_code = ExitCode.USAGE


class PlaintextTooLarge(KmsfsError):
    """More plaintext than the chosen format takes."""

    errno = errno.EFBIG
    exit_code = ExitCode.USAGE


class ConfigInvalid(KmsfsError):
    """A configuration file or option has an unknown key or an impossible value."""

    errno = errno.EINVAL
    exit_code = ExitCode.USAGE


class ConfigUntrusted(KmsfsError):
    """Somebody else could write the configuration file or a directory above it."""

    errno = errno.EACCES
    exit_code = ExitCode.USAGE
    hint = "make it and every directory above it writable by root or the mounting user alone"


# --- ciphertext --------------------------------------------------------------------------------


class CiphertextInvalid(KmsfsError):
    """Not authentic, truncated, mutated, or with bytes after its end."""

    errno = errno.EBADMSG
    exit_code = ExitCode.NOT_AUTHENTIC
    hint = "restore the file from where it was encrypted, or encrypt it again"


class FormatUnknown(CiphertextInvalid):
    """The bytes are of no format that kmsfs reads."""

    hint = "kmsfs reads KMS ciphertext blobs (also in base64) and AWS Encryption SDK messages"


class AlgorithmNotAllowed(CiphertextInvalid):
    """An Encryption SDK message of a suite without key commitment."""

    hint = "encrypt it again, or set allow_non_committing = true under [kms]"


class ContextMismatch(CiphertextInvalid):
    """The authenticated encryption context is not the one required here."""

    hint = "the file was moved, renamed or copied from elsewhere: encrypt it for this place"


class NotBound(CiphertextInvalid):
    """The volume requires bound files, and this one is not bound to any place."""

    hint = "encrypt it with `kmsfs encrypt`, or name it under unbound in kmsfs.toml"


class RolledBack(CiphertextInvalid):
    """An older version than one that this mount has seen lies in its place."""

    hint = "put the newest version back, or accept this one: `kmsfs refresh --accept-older PATH`"


class CiphertextChanging(CiphertextInvalid):
    """The file changed while it was read, twice in a row."""

    hint = "replace ciphertext by rename, not by writing in place"


class FileTooLarge(KmsfsError):
    """More than max_file_bytes."""

    errno = errno.EFBIG
    exit_code = ExitCode.GUARANTEE_NOT_MET
    hint = "raise max_file_bytes under [cache]"


# --- keys --------------------------------------------------------------------------------------


class KeyAccessDenied(KmsfsError):
    """KMS refused: no permission in key policy, IAM or grants."""

    errno = errno.EKEYREJECTED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "give this role kms:Decrypt on the key"


class KeyNotAllowed(KmsfsError):
    """The file is encrypted under a key that is not in the allow-list; KMS was not asked."""

    errno = errno.EKEYREJECTED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "add the key's ARN to key_ids under [kms], or with --key-id"


class IncorrectKey(KmsfsError):
    """KMS: none of the allowed keys encrypted this file."""

    errno = errno.EKEYREJECTED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "name the key that encrypted it with --key-id"


class KeyNotFound(KmsfsError):
    """KMS knows no such key."""

    errno = errno.EKEYREJECTED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "check the key's ARN, account and region"


class KeyUnusable(KmsfsError):
    """The key is disabled, pending deletion or otherwise not usable."""

    errno = errno.EKEYREVOKED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "enable the key or cancel its deletion"


class KeyPolicyRefused(KmsfsError):
    """KMS takes no policy that names who does not exist, or that locks out its author."""

    errno = errno.EKEYREJECTED
    exit_code = ExitCode.REFUSED_BY_KMS
    hint = "check that every role and user named exists; a new one takes some seconds to be seen"


class CredentialsUnavailable(KmsfsError):
    """No AWS credentials, or expired or invalid ones."""

    errno = errno.EKEYEXPIRED
    exit_code = ExitCode.KMS_UNAVAILABLE
    hint = "give this process a role, a profile or credentials"


class KmsUnreachable(KmsfsError):
    """No answer from KMS within the deadline, or only failures of its own."""

    errno = errno.ETIMEDOUT
    exit_code = ExitCode.KMS_UNAVAILABLE
    hint = "check network, endpoint and region; the next open tries again"


class KmsThrottled(KmsUnreachable):
    """KMS throttled us past the deadline."""

    hint = "the account's KMS request quota is used up; the next open tries again"


class DeadlineExceeded(KmsUnreachable):
    """The open's deadline passed."""


class TooManyWaiting(KmsUnreachable):
    """More opens wait for KMS than are allowed to."""


class KmsAnswerInvalid(KmsfsError):
    """KMS or something in its place answered what KMS never answers."""

    errno = errno.EIO
    exit_code = ExitCode.KMS_UNAVAILABLE
    hint = "check what stands between this machine and KMS"


class RegionUnknown(KmsfsError):
    """No AWS region for this key."""

    errno = errno.EKEYEXPIRED
    exit_code = ExitCode.USAGE
    hint = "give the key as an ARN, or a region with --region"


# --- serving -----------------------------------------------------------------------------------


class VolumeLocked(KmsfsError):
    """`kmsfs lock` was called."""

    errno = errno.ENOKEY
    exit_code = ExitCode.KMS_UNAVAILABLE
    hint = "kmsfs unlock"


class PolicyDenied(KmsfsError):
    """A local rule says no."""

    errno = errno.EACCES
    exit_code = ExitCode.REFUSED_BY_KMS


class NameConflict(KmsfsError):
    """Two source files claim one served name."""

    errno = errno.ENOTUNIQ
    exit_code = ExitCode.USAGE
    hint = "remove or rename one of them"


class SourceMissing(KmsfsError):
    """The source file or directory is gone."""

    errno = errno.ENOENT
    exit_code = ExitCode.USAGE


class SourceUnreadable(KmsfsError):
    """The source file or directory is there and cannot be read."""

    errno = errno.EIO
    exit_code = ExitCode.USAGE


class LockedMemoryExhausted(KmsfsError):
    """No locked memory left for this plaintext."""

    errno = errno.ENOMEM
    exit_code = ExitCode.GUARANTEE_NOT_MET
    hint = "raise max_bytes under [cache] and the locked-memory limit (LimitMEMLOCK, ulimit -l)"


class RamLimitReached(KmsfsError):
    """The ramfs view's files together would be larger than max_bytes."""

    errno = errno.ENOMEM
    exit_code = ExitCode.GUARANTEE_NOT_MET
    hint = "raise max_bytes under [cache]"


class GuaranteeNotMet(KmsfsError):
    """A guarantee that was asked for cannot be given on this machine."""

    errno = errno.ENOMEM
    exit_code = ExitCode.GUARANTEE_NOT_MET


class AuditFailed(KmsfsError):
    """Every open has to be recorded, and this one cannot be."""

    errno = errno.EIO
    exit_code = ExitCode.GUARANTEE_NOT_MET
    hint = "make the file under [audit] writable, or set required = false there"


class WorkerFailed(KmsfsError):
    """A decrypting process died or answered nonsense, twice."""

    errno = errno.EIO
    exit_code = ExitCode.BUG
    hint = "see the log; the next open tries again with a new process"


class WorkerBug(KmsfsError):
    """A decrypting process met an error it does not know."""

    errno = errno.EIO
    exit_code = ExitCode.BUG
    hint = "this is a bug in kmsfs: please report it with the error's name"


class DaemonBug(KmsfsError):
    """The daemon met an error it does not know."""

    errno = errno.EIO
    exit_code = ExitCode.BUG
    hint = "this is a bug in kmsfs: please report it with the error's name"


# --- mounting ----------------------------------------------------------------------------------


class MountpointUnusable(KmsfsError):
    """Missing, busy, not empty, not a directory, or not one of ours."""

    errno = errno.EINVAL
    exit_code = ExitCode.MOUNTPOINT


class MountFailed(KmsfsError):
    """The kernel or fusermount3 refused, or the daemon did not come up."""

    errno = errno.EIO
    exit_code = ExitCode.MOUNTPOINT


class FuseUnavailable(MountFailed):
    """This machine has no FUSE, or does not let this process use it."""

    hint = "load the fuse module, pass /dev/fuse through, or use --view ramfs"


class ControlUnavailable(KmsfsError):
    """The mount's daemon does not answer on its control socket."""

    errno = errno.EIO
    exit_code = ExitCode.MOUNTPOINT
