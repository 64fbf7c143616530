"""Audit records: every event has a line that fits, and a launcher that is gone is no exception."""

import json
import socket

import pytest
import trio
import trio.testing

from kmsfs.admin import audit_log
from kmsfs.admin.audit import Audit
from kmsfs.errors import AuditFailed
from kmsfs.events import DecryptFailed, NotShown, Opened
from kmsfs.settings import AuditSettings


def test_a_name_that_is_not_utf_8_is_recorded_as_text_that_is() -> None:
    record = json.loads(audit_log.line_of(NotShown("bad-\udcff", "CiphertextInvalid", "cut")))
    assert (record["event"], record["path"]) == ("NotShown", "bad-\\xff")


def test_texts_of_any_length_fit_a_frame() -> None:
    event = DecryptFailed("\x01" * 100_000, "KeyNotAllowed", "\x02" * 100_000, 1.0)
    frame = audit_log.frame_of(1, audit_log.line_of(event))
    assert len(frame) < audit_log.MAX_FRAME_BYTES
    assert json.loads(audit_log.take_apart(frame)[1])["path"].endswith("…")


@pytest.mark.trio
async def test_a_launcher_killed_with_records_unread_refuses_opens_and_nothing_else() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    audit = Audit(AuditSettings(file="/log", required=True), ours)
    refused: list[AuditFailed] = []

    async def open_one() -> None:
        try:
            await audit.admit(Opened("a", 1, 2, 3, from_cache=False))
        except AuditFailed as error:
            refused.append(error)

    with ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_one)
            await trio.testing.wait_all_tasks_blocked()
            theirs.close()
            await audit.run()
        await open_one()
    assert len(refused) == 2
    assert audit.status.problem == "Broken pipe"
