"""/etc/kmsfs/NAME.toml as the administrator of a machine uses it, with real commands."""

import sys
from pathlib import Path

from tests.support.canary import secret
from tests.support.moto_kms import MotoKms
from tests.support.private_machine import Session, run_session

_DEFINE = """\
mkdir -p /etc/kmsfs {source}/db mnt && cat >/etc/kmsfs/web.toml <<'TOML'
[volume]
source = "{source}"

[kms]
key_ids = ["{key}"]
TOML
"""


def run(kms: MotoKms, directory: Path, *commands: str) -> Session:
    programs = Path(sys.executable).parent
    session = run_session(
        commands,
        directory=directory,
        env=kms.env(PATH=f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"),
        cwd=directory,
        timeout_s=120,
    )
    assert [ran for ran in session.ran if ran.status != 0] == []
    assert len(session.ran) == len(commands)
    return session


def test_volume_of_the_system_configuration_binds_and_serves(
    mountable: None, moto_kms: MotoKms, moto_key: str, tmp_path: Path
) -> None:
    plaintext = secret("password", 40)
    (tmp_path / "password").write_bytes(plaintext)
    source = tmp_path / "source"

    session = run(
        moto_kms,
        tmp_path,
        _DEFINE.format(source=source, key=moto_key),
        f"kmsfs encrypt password -o {source}/db",
        f"kmsfs inspect {source}/db/password.encrypted",
        f"kmsfs mount {source} mnt",
        "cat mnt/db/password",
        f"! kmsfs encrypt password -o {tmp_path}/elsewhere.encrypted",
        f"cp {source}/db/password.encrypted {source}/moved.encrypted",
        "! cat mnt/moved",
        "kmsfs umount mnt",
    )

    shown = session.of("kmsfs inspect").stdout
    assert b"kmsfs:path=db/password\n" in shown
    assert b"kmsfs:volume=web\n" in shown
    assert session.of("cat mnt/db").stdout == plaintext
    assert "Bad message" in session.of("! cat").stderr
    assert session.left_mounted == ()


_HOOKS = """\
mkfifo ran reloaded && cat >>/etc/kmsfs/web.toml <<'TOML'

[[on_change]]
match = "web/*"
run = ["sh", "-c", "echo $KMSFS_MOUNTPOINT $KMSFS_CHANGED >{directory}/ran"]

[[on_change]]
match = "**"
unit = "web.service"
TOML
printf '#!/bin/sh\\necho "$@" >{directory}/reloaded\\n' >/usr/local/sbin/systemctl
chmod +x /usr/local/sbin/systemctl
"""


def test_hooks_of_the_system_configuration_run_when_files_change(
    mountable: None, moto_kms: MotoKms, moto_key: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(secret("key", 40))
    source = tmp_path / "source"

    session = run(
        moto_kms,
        tmp_path,
        _DEFINE.format(source=source, key=moto_key),
        _HOOKS.format(directory=tmp_path),
        f"kmsfs mount {source} mnt",
        f"mkdir {source}/web && kmsfs encrypt key -o {source}/web",
        "timeout 20 cat ran",
        "timeout 20 cat reloaded",
        "kmsfs status mnt",
        "kmsfs umount mnt",
    )

    assert session.of("timeout 20 cat ran").stdout == f"{tmp_path}/mnt 1\n".encode()
    told = session.of("timeout 20 cat reloaded").stdout
    assert told == b"try-reload-or-restart web.service\n"
    assert b"hook     **: systemctl try-reload-or-restart web.service" in (
        session.of("kmsfs status").stdout
    )
    assert session.left_mounted == ()


def test_a_volume_is_mounted_and_its_configuration_shown_by_name(
    mountable: None, moto_kms: MotoKms, moto_key: str, tmp_path: Path
) -> None:
    plaintext = secret("password", 40)
    (tmp_path / "password").write_bytes(plaintext)
    source = tmp_path / "source"

    session = run(
        moto_kms,
        tmp_path,
        _DEFINE.format(source=source, key=moto_key),
        f"sed -i 's|^source|mountpoint = \"{tmp_path}/mnt\"\\nsource|' /etc/kmsfs/web.toml",
        f"kmsfs encrypt password -o {source}/db",
        "kmsfs config check",
        "kmsfs config show web",
        # A directory of the same name is not meant.
        "mkdir -p web && kmsfs mount web",
        "cat mnt/db/password",
        "kmsfs umount mnt",
        "sed -i /mountpoint/d /etc/kmsfs/web.toml && ! kmsfs mount web",
        "! kmsfs mount ./web",
    )

    assert session.of("kmsfs config check").stdout == b"web: ok\n"
    assert f'mountpoint = "{tmp_path}/mnt"  # /etc/kmsfs/web.toml\n'.encode() in (
        session.of("kmsfs config show").stdout
    )
    assert session.of("cat mnt/db").stdout == plaintext
    assert "mountpoint is missing under [volume]" in session.of("sed -i /mountpoint").stderr
    assert "where is ./web to be mounted?" in session.of("! kmsfs mount ./web").stderr
    assert session.left_mounted == ()
