"""The tests in this directory hold in either view, and run in each.

What differs on purpose is one line of a test: a choice by `view`.
"""

import pytest


@pytest.fixture(params=["fuse", "ramfs"])
def view(request: pytest.FixtureRequest) -> str:
    """The view that `site` and `strict_site` mount."""
    chosen: str = request.param
    return chosen
