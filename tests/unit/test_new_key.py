"""Making a key: what becomes of it where somebody interrupts."""

import pytest

from kmsfs.errors import KmsUnreachable
from kmsfs.manage.key_policy import Principals
from kmsfs.manage.new_key import create_key, plan_key

KEY = "arn:aws-cn:kms:cn-north-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


class Interrupted:
    """Makes a key, and is interrupted before it gets its alias."""

    def __init__(self) -> None:
        self.policy = ""
        self.rotates = False

    def caller_arn(self) -> str:
        return "arn:aws-cn:sts::111122223333:assumed-role/admin/session"

    def alias_exists(self) -> bool:
        return False

    def create_key(self, *, policy: str, description: str, multi_region: bool) -> str:
        self.policy = policy
        return KEY

    def enable_rotation(self, key_arn: str) -> None:
        self.rotates = True

    def create_alias(self, key_arn: str) -> None:
        raise KeyboardInterrupt


def test_key_that_was_made_is_named_to_who_interrupts() -> None:
    plan = plan_key("web", volume=None, context={}, principals=Principals(), multi_region=False)
    admin = Interrupted()
    with pytest.raises(KmsUnreachable, match=f"the key {KEY} was made") as caught:
        create_key(plan, admin)
    assert admin.rotates
    assert "aws kms create-alias" in caught.value.hint
    assert "enable-key-rotation" not in caught.value.hint


def test_account_is_the_callers_in_its_partition() -> None:
    plan = plan_key("web", volume=None, context={}, principals=Principals(), multi_region=False)
    admin = Interrupted()
    with pytest.raises(KmsUnreachable):
        create_key(plan, admin)
    assert '"arn:aws-cn:iam::111122223333:root"' in admin.policy
