"""One role of each kind that a key policy of kmsfs knows, none of them with IAM policies."""

from dataclasses import dataclass
from typing import Self

from tests.support.strict_identities import Identity
from tests.support.strict_kms import StrictKms


@dataclass(frozen=True)
class KeyRoles:
    """Sessions of the roles `reader`, `writer` and `admin`, and of `nobody`, whom no policy names.

    Only what a key's policy grants to them by name may they do.
    """

    reader: Identity
    writer: Identity
    admin: Identity
    nobody: Identity

    @classmethod
    def create(cls, kms: StrictKms) -> Self:
        """Make the roles, in the stand-in's own account."""
        made = []
        for name in ("reader", "writer", "admin", "nobody"):
            role = kms.create_role(name)
            kms.withhold_policies(role)
            made.append(kms.take_on(role))
        return cls(*made)

    @property
    def options(self) -> list[str]:
        """How `kmsfs key` is told of them."""
        return [
            *("--reader", arn_of(self.reader)),
            *("--writer", arn_of(self.writer)),
            *("--admin", arn_of(self.admin)),
        ]


def arn_of(identity: Identity) -> str:
    """The ARN of a role that was taken on."""
    assert identity.role_arn is not None
    return identity.role_arn
