"""A volume under a key that `kmsfs key create` made: the reader's role is enough for a mount."""

from pathlib import Path

from tests.support.commands import run_kmsfs
from tests.support.key_roles import KeyRoles
from tests.support.refusals import exit_code_of_mount, refusal_of
from tests.support.sites import StrictSite


def encrypt(site: StrictSite, path: Path, content: bytes, env: dict[str, str]) -> None:
    run_kmsfs(["encrypt", "-", "-o", path], env=env, stdin=content)


def test_writer_encrypts_what_a_mount_of_the_reader_serves(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    roles = KeyRoles.create(site.kms)
    run_kmsfs(["key", "create", "--alias", "web", *roles.options], env=site.env)
    key = site.kms.keys()[-1]
    site.make_volume(key_ids=(key.arn,))
    content = site.secret("roles", 60)
    encrypt(site, site.source / "token.encrypted", content, site.kms.env(roles.writer))

    volume = site.mount(env=site.kms.env(roles.reader))
    assert (volume.path / "token").read_bytes() == content
    assert volume.failing() == {}
    volume.umount()

    site.kms.forget_calls()
    refused = site.mount(env=site.kms.env(roles.writer), exit_code=exit_code_of_mount(view))
    assert refusal_of(refused, "token")[1] == "KeyAccessDenied"
    assert {call.error for call in site.kms.calls()} == {"AccessDeniedException"}
