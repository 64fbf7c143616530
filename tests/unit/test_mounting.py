"""What an administrator asks for when mounting, and what becomes of it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kmsfs.errors import ConfigInvalid, InputUnreadable, UsageInvalid
from kmsfs.manage.keys import KeyOptions
from kmsfs.manage.mounting import MountOptions, mount_config, with_option_text
from kmsfs.settings import MountConfig

NOT_UTF_8 = os.fsdecode(b"caf\xe9")
ANY_KEY = MountOptions(keys=KeyOptions(any_key=True))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory without a kmsfs.toml."""
    directory = tmp_path / "source"
    directory.mkdir()
    return directory


def configured(source: Path, options: MountOptions) -> MountConfig:
    return mount_config(str(source), str(source.parent / "mnt"), options)


def with_rule(source: Path, line: str) -> MountConfig:
    for directory in (source, source.parent, source.parent.parent):
        directory.chmod(0o755)
    text = f'[volume]\nname = "web"\n[[rule]]\nmatch = "*"\n{line}\n'
    (source / "kmsfs.toml").write_text(text)
    return configured(source, ANY_KEY)


def test_option_texts_add_up_and_a_later_value_replaces_an_earlier_one() -> None:
    options = with_option_text(MountOptions(), "owner=root,key_id=a,mode=0440,ro,x-note=1,,nofail")
    options = with_option_text(options, "key_id=b,mode=0400,encryption_context=a=b=c,allow_other")
    options = with_option_text(options, r"encryption_context=list=1\,2,region=eu-west-1")
    assert options == MountOptions(
        keys=KeyOptions(
            key_ids=("a", "b"),
            encryption_context={"a": "b=c", "list": "1,2"},
            region="eu-west-1",
        ),
        owner="root",
        mode="0400",
        allow_other=True,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("colour", "unknown mount option 'colour'"),
        ("any_key=1", "unknown mount option 'any_key'"),
        ("key_id", "'key_id' needs a value"),
        ("mode=", "'mode' needs a value"),
        ("encryption_context=a", "not of the form K=V"),
        ("encryption_context==b", "not of the form K=V"),
    ],
)
def test_option_text_that_makes_no_sense_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageInvalid, match=reason):
        with_option_text(MountOptions(), f"ro,{text}")


@pytest.mark.parametrize(("text", "number"), [("daemon", 1), ("0", 0), ("4294967294", 4294967294)])
def test_owner_and_group_are_names_or_numbers(source: Path, text: str, number: int) -> None:
    by_option = configured(source, replace(ANY_KEY, owner=text, group=text)).ownership
    assert (by_option.uid, by_option.gid) == (number, number)
    (rule,) = with_rule(source, f'owner = "{text}"\ngroup = "{text}"').rules
    assert (rule.uid, rule.gid) == (number, number)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4294967295", "4294967294 is the highest"),
        ("9999999999", "4294967294 is the highest"),
        ("99999999999", "there is no"),
        ("-1", "there is no"),
        ("²", "there is no"),
        ("", "there is no"),
        ("a\0b", "there is no"),
        (NOT_UTF_8, "there is no"),
        ("no-such-name", "there is no"),
    ],
)
def test_what_is_neither_is_refused(source: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        configured(source, replace(ANY_KEY, owner=text))
    with pytest.raises(ConfigInvalid, match=reason):
        configured(source, replace(ANY_KEY, group=text))


def test_number_in_a_rule_that_no_user_can_have_is_refused(source: Path) -> None:
    with pytest.raises(ConfigInvalid, match="user's number"):
        with_rule(source, 'owner = "4294967295"')
    with pytest.raises(ConfigInvalid, match="group's number"):
        with_rule(source, 'group = "4294967295"')


@pytest.mark.parametrize(
    "keys",
    [
        KeyOptions(key_ids=(NOT_UTF_8,)),
        KeyOptions(any_key=True, encryption_context={"a": NOT_UTF_8}),
        KeyOptions(any_key=True, encryption_context={NOT_UTF_8: "a"}),
        KeyOptions(any_key=True, profile=NOT_UTF_8),
        KeyOptions(any_key=True, region=NOT_UTF_8),
        KeyOptions(any_key=True, endpoint_url=NOT_UTF_8),
    ],
)
def test_value_that_is_not_utf_8_is_refused(source: Path, keys: KeyOptions) -> None:
    with pytest.raises(UsageInvalid, match=r"b'caf\\xe9' is not UTF-8"):
        configured(source, MountOptions(keys=keys))


def test_source_must_be_a_directory_whose_path_is_utf_8(source: Path) -> None:
    with pytest.raises(InputUnreadable, match="missing is not a directory"):
        configured(source / "missing", ANY_KEY)
    with pytest.raises(UsageInvalid, match="is not UTF-8"):
        configured(source / NOT_UTF_8, ANY_KEY)


def test_any_key_and_certain_ones_contradict_each_other(source: Path) -> None:
    with pytest.raises(UsageInvalid, match="contradict"):
        configured(source, with_option_text(MountOptions(), "any_key,key_id=a"))


def test_some_key_must_be_allowed(source: Path) -> None:
    with pytest.raises(UsageInvalid, match="no key is allowed"):
        configured(source, MountOptions())
