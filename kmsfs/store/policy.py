"""Who may open what: owner, group and mode of every path. The kernel enforces them."""

from dataclasses import dataclass

from kmsfs.settings import Ownership, OwnershipRule, path_matches


@dataclass(frozen=True, slots=True)
class Permissions:
    """Numeric owner and group, and permission bits."""

    uid: int
    gid: int
    mode: int


class Policy:
    """Permissions by path pattern; the first rule that matches wins.

    Args:
        prefix: what stands before a served path to make it relative to the volume's root,
            which is what rules speak of.
    """

    def __init__(
        self, defaults: Ownership, rules: tuple[OwnershipRule, ...], *, prefix: str = ""
    ) -> None:
        self._defaults = defaults
        self._rules = rules
        self._prefix = prefix
        self._file_default = Permissions(defaults.uid, defaults.gid, defaults.mode)
        self._known: dict[str, Permissions] = {}

    def of_directory(self) -> Permissions:
        """Directories all have the mount's owner and `dir_mode`."""
        return Permissions(self._defaults.uid, self._defaults.gid, self._defaults.dir_mode)

    def of_file(self, path: str) -> Permissions:
        """Permissions of the file served at `path`."""
        if not self._rules:
            return self._file_default
        found = self._known.get(path)
        if found is None:
            found = self._known[path] = self._match(self._prefix + path)
        return found

    def _match(self, path: str) -> Permissions:
        default = self._file_default
        for rule in self._rules:
            if path_matches(rule.match, path):
                return Permissions(
                    uid=default.uid if rule.uid is None else rule.uid,
                    gid=default.gid if rule.gid is None else rule.gid,
                    mode=default.mode if rule.mode is None else rule.mode,
                )
        return default
