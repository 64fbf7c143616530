"""The manual page, and the script that makes it."""

import shutil
import subprocess

import pytest

from contrib.docs import make_man
from kmsfs.errors import ExitCode


def test_committed_page_is_what_the_help_texts_say_now() -> None:
    assert make_man.PAGE.read_text() == make_man.page(), "run contrib/docs/make_man.py"


def test_page_tells_every_exit_status_of_the_program() -> None:
    assert set(make_man.EXIT_STATUS) == set(ExitCode) - {ExitCode.MOUNT_HELPER_FAILED}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_page_is_free_of_warnings() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z", make_man.PAGE],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
