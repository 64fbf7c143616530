"""How a file that cannot be decrypted shows in a mount.

In the FUSE view it is there, and opening it fails with an errno that says why. In the ramfs view
it is not there. `kmsfs status` names it with the same error in both.
"""

from tests.support.mounts import MountedVolume, strerror_of_cat

BAD_MESSAGE = "Bad message"
NO_KEY = "Required key not available"
NOT_UNIQUE = "Name not unique on network"
ABSENT = "No such file or directory"


def said_of_refused(view: str, *, fuse: str) -> str:
    """What programs say of a file that is refused: `fuse` there, in a ramfs that it is absent."""
    return {"fuse": fuse, "ramfs": ABSENT}[view]


def exit_code_of_mount(view: str) -> int:
    """Of `kmsfs mount` if some file cannot be decrypted: only the ramfs view knows by then."""
    return {"fuse": 0, "ramfs": 1}[view]


def refusal_of(volume: MountedVolume, path: str) -> tuple[str, str]:
    """What `cat` says of a file, and the error that status names then; both empty if it is read."""
    said = strerror_of_cat(volume.path / path)
    return said, volume.failing().get(path, "")
