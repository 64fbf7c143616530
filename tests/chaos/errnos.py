"""Which errors a reader may meet, and when.

| errno | FUSE view: only if, meanwhile |
|---|---|
| EBADMSG | the file was tampered with or replaced |
| ENOENT, ESTALE | it was removed, tampered with or replaced, or the daemon was dead |
| ENOKEY | the volume was locked, or the launcher was dead |
| EKEYREJECTED, EKEYREVOKED | KMS refused or was away, or the file was tampered with |
| ENOTCONN, ECONNABORTED | the daemon was dead |
| EFAULT (of a map: SIGBUS) | it was locked, the daemon was dead, or the file was replaced |
| ETIMEDOUT, EIO | any time but in a calm |

In the ramfs view a file that cannot be decrypted, or not now, is not there: ENOENT, and nothing
else ever. In a calm there is no error at all.
"""

import errno
from dataclasses import dataclass
from typing import Final

from tests.chaos.table import Table

# An open joins a decryption that is under way, and gets what that one was told: a refusal may
# outlive its cause so long, in seconds.
_FLIGHT_S: Final = 5.0


@dataclass(frozen=True)
class Moment:
    """The state of everything just before a read, or before the open of what is read."""

    calm: int
    newest: int
    tampered: int
    absent: int
    lock: int
    daemon: int
    kms: int

    @staticmethod
    def of(table: Table, index: int) -> "Moment":
        """Now."""
        row = table.files[index]
        return Moment(
            calm=table.calm,
            newest=row.newest,
            tampered=row.tampered.mark(),
            absent=row.absent.mark(),
            lock=table.lock.mark(),
            daemon=table.daemon.mark(),
            kms=table.kms.mark(),
        )


def is_calm_since(moment: Moment, table: Table) -> bool:
    """Whether one calm lasted all the time."""
    return moment.calm % 2 == 1 and moment.calm == table.calm


def is_allowed(number: int, moment: Moment, table: Table, index: int, view: str) -> bool:
    """Whether an error is one that may come, given what happened since the moment."""
    if is_calm_since(moment, table):
        return False
    if view == "ramfs":
        return number == errno.ENOENT
    row = table.files[index]
    replaced = row.newest != moment.newest
    tampered = row.tampered.overlaps(moment.tampered)
    moved = replaced or tampered or row.absent.overlaps(moment.absent)
    dead = table.daemon.overlaps(moment.daemon)
    match number:
        case errno.EBADMSG:
            return moved
        case errno.ENOENT | errno.ESTALE:
            return moved or dead
        case errno.ENOKEY:
            # A daemon without its launcher locks before it ends.
            return dead or table.lock.overlaps(moment.lock)
        case errno.EKEYREJECTED | errno.EKEYREVOKED:
            return tampered or table.kms.overlaps(moment.kms, _FLIGHT_S)
        case errno.ENOTCONN | errno.ECONNABORTED:
            return dead
        case errno.EFAULT:
            return moved or dead or table.lock.overlaps(moment.lock)
        case errno.ETIMEDOUT | errno.EIO:
            return True
    return False
