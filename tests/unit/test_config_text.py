"""What is wrong with a kmsfs.toml is said with its line, its value and the nearest right word."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmsfs.config_files import load_volume_file
from kmsfs.config_text import line_of, with_line
from kmsfs.errors import ConfigInvalid

_FILE = """\
# a volume
[volume]
name = "web"          # its name

[kms]
region = "us-east-1"
deadline_s = 8.0

[[rule]]
match = "a"

[[rule]]
match = "b"
mode = "0440"
"""


def complaint_about(tmp_path: Path, text: str) -> tuple[str, str]:
    for directory in (tmp_path, tmp_path.parent):
        directory.chmod(0o755)
    path = tmp_path / "kmsfs.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load_volume_file(path, uid=os.geteuid(), overlay_dir=tmp_path / "none")
    return caught.value.detail.removeprefix(f"{path}: "), caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "detail", "hint"),
    [
        (
            "deadline_s = 8.0",
            "deadline = 8.0",
            "line 7: unknown key 'deadline' under [kms]",
            "did you mean deadline_s?",
        ),
        (
            "region =",
            "ttl_s =",
            "line 6: unknown key 'ttl_s' under [kms]",
            "it belongs under [cache]",
        ),
        (
            "deadline_s = 8.0",
            'deadline_s = "8"',
            "line 7: kms.deadline_s = '8': expected `float`, got `str`",
            "",
        ),
        (
            "deadline_s = 8.0",
            "deadline_s = 800",
            "line 7: kms.deadline_s = 800: expected `float` <= 120.0",
            "",
        ),
        ("[kms]", "[kmss]", "line 5: unknown table 'kmss'", "did you mean [kms]?"),
        (
            'mode = "0440"',
            'modus = "0440"',
            "line 14: unknown key 'modus' under [rule]",
            "did you mean mode?",
        ),
        (
            'mode = "0440"',
            "mode = 288",
            "line 14: rule.mode = 288: expected `str | null`, got `int`",
            "",
        ),
        ('match = "b"\n', "", "line 12: match is missing under [rule]", ""),
        (
            '[kms]\nregion = "us-east-1"',
            '[cache]\nmax_bytes = "64MB"\n[kms]',
            "line 6: cache.max_bytes = '64MB' is not a size",
            "a number of bytes, or a number followed by B, KiB, MiB or GiB",
        ),
        (
            "region =",
            "zzzz =",
            "line 6: unknown key 'zzzz' under [kms]",
            (
                "one of key_ids, encryption_context, profile, role_arn, region, endpoint_url, "
                "deadline_s, allow_non_committing"
            ),
        ),
    ],
)
def test_it_is_said_where_and_what_was_probably_meant(
    tmp_path: Path, old: str, new: str, detail: str, hint: str
) -> None:
    assert old in _FILE
    assert complaint_about(tmp_path, _FILE.replace(old, new)) == (detail, hint)


def test_what_is_not_found_in_the_text_is_said_without_a_line(tmp_path: Path) -> None:
    text = '[volume]\nname = "web"\n[kms]\nencryption_context = { "a" = 5 }\n'
    detail, _ = complaint_about(tmp_path, text)
    assert detail.startswith("line 4: kms.encryption_context")
    assert with_line("cache.ttl_s is odd", text) == "cache.ttl_s is odd"


def test_a_long_value_is_cut_short(tmp_path: Path) -> None:
    detail, _ = complaint_about(tmp_path, f"[cache]\nttl_s = '{'x' * 500}'\n")
    assert len(detail) < 200


@given(st.text(max_size=400), st.sampled_from(["volume", "rule"]), st.text(max_size=10))
def test_any_text_may_be_searched(text: str, table: str, key: str) -> None:
    found = line_of(text, table, key)
    assert found is None or 1 <= found <= len(text.splitlines())
