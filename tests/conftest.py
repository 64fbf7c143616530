"""Fixtures of all tests. What they give is described in `tests/support`.

Beside the fixtures below every test runs under the watch of `tests.support.watch`: plaintext
made by `tests.support.canary.secret` must show nowhere, and no process or mount may be left.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aws_files import AwsFiles
from tests.support.fault_proxy import FaultProxy
from tests.support.moto_kms import MotoKms
from tests.support.requirements import require_mount
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

pytest_plugins = ["tests.support.watch", "tests.support.site_fixtures"]


@pytest.fixture(autouse=True)
def _no_aws_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the machine's AWS configuration nor its metadata service is asked by a test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))


@pytest.fixture
def aws_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AwsFiles:
    """This process's AWS configuration and environment, to be filled by the test."""
    return AwsFiles(tmp_path, monkeypatch)


@pytest.fixture
def strict_kms() -> Iterator[StrictKms]:
    """The strict stand-in for KMS, empty but for its admin."""
    with StrictKms() as kms:
        yield kms


@pytest.fixture
def kms_key(strict_kms: StrictKms) -> KmsKey:
    """A fresh key of `strict_kms`, with the alias `alias/test`."""
    return strict_kms.create_key(alias="alias/test")


@pytest.fixture
def fault_proxy(strict_kms: StrictKms) -> Iterator[FaultProxy]:
    """A proxy in front of `strict_kms`, without faults yet."""
    with FaultProxy(strict_kms.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def moto_kms() -> Iterator[MotoKms]:
    """moto's server in a process of its own, for good paths; keys and aliases pile up."""
    with MotoKms() as kms:
        yield kms


@pytest.fixture
def moto_key(moto_kms: MotoKms) -> str:
    """ARN of a fresh key of `moto_kms`."""
    return moto_kms.create_key()


@pytest.fixture
def mountable() -> None:
    """Skips the test where it cannot mount; see `require_mount`."""
    require_mount()
