"""Errors that cross from one process to another: by their names."""

from typing import Final

from kmsfs.errors import KmsfsError, WorkerBug


def _leaves(root: type[KmsfsError]) -> dict[str, type[KmsfsError]]:
    found: dict[str, type[KmsfsError]] = {}
    for cls in root.__subclasses__():
        found[cls.__name__] = cls
        found |= _leaves(cls)
    return found


_BY_CODE: Final = _leaves(KmsfsError)


def from_code(code: str, detail: str, hint: str | None = None) -> KmsfsError:
    """Rebuild an error that another process reported.

    Args:
        code: `KmsfsError.code` of the original; an unknown one becomes `WorkerBug`.
        detail: its detail.
        hint: its hint, if it differed from the class's own.
    """
    cls = _BY_CODE.get(code)
    if cls is None:
        return WorkerBug(f"{code}: {detail}", hint=hint)
    return cls(detail, hint=hint)
