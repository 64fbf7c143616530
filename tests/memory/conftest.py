"""Fixtures of the tests that look for plaintext from outside."""

import secrets

import pytest


@pytest.fixture
def own() -> str:
    """The start of this test's labels: what others left on the machine is not taken for its own.

    Of one length, so that no label begins with another test's.
    """
    return secrets.token_hex(4)
