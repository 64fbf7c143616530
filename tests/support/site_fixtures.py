"""Fixtures of all tests that mount for real."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.moto_kms import MotoKms
from tests.support.mounts import Mounter
from tests.support.sites import Site, StrictSite
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms


@pytest.fixture
def view() -> str:
    """The view that is mounted where a test does not say; empty for what kmsfs takes itself."""
    return ""


@pytest.fixture
def site(
    *,
    mountable: None,
    view: str,
    tmp_path: Path,
    public_directory: Path,
    moto_kms: MotoKms,
    moto_key: str,
) -> Iterator[Site]:
    """A source whose key is moto's; its mounts are unmounted in the end."""
    mounter = Mounter(moto_kms.env(), view)
    made = Site(tmp_path / "site", moto_kms.env(), moto_key, moto_kms.client(), mounter)
    made.source.mkdir(parents=True)
    yield made
    assert mounter.clean_up() == []


@pytest.fixture
def strict_site(
    mountable: None, view: str, tmp_path: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> Iterator[StrictSite]:
    """A source whose key is the strict stand-in's; its mounts are unmounted in the end."""
    mounter = Mounter(strict_kms.env(), view)
    client = strict_kms.client()
    made = StrictSite(
        tmp_path / "site", strict_kms.env(), kms_key.arn, client, mounter, strict_kms, kms_key
    )
    made.source.mkdir(parents=True)
    yield made
    strict_kms.heal()
    assert mounter.clean_up() == []


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that other users may enter; short, as paths of UNIX sockets have to be."""
    path = Path(tempfile.mkdtemp(prefix="kmsfs-test-", dir="/run"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
