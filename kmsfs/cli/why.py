"""`kmsfs why`: what the last open of a file met, in words."""

import os
import sys
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import json_option
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode

if TYPE_CHECKING:
    from kmsfs.admin.status import FileReport
    from kmsfs.kms_call import KmsCall

_MINUTE_S = 60
_HOUR_S = 60 * _MINUTE_S


@click.command()
@click.argument("path", type=click.Path())
@json_option
def why(path: str, *, as_json: bool) -> int:
    """Show what the last open of a file at PATH met, in a mount: error, key, who asked, what to do.

    In the ramfs view it is what the last decryption met. KMS is not asked for this.
    """
    import msgspec

    from kmsfs.admin import control
    from kmsfs.cli import mounts

    mount, below = mounts.find_below(path)
    answer = control.call(mount.device, os.geteuid(), control.WhyRequest(path=below))
    assert isinstance(answer, control.WhyAnswer)
    if as_json:
        encoded = msgspec.json.encode(answer.file)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
    else:
        click.echo(as_text(answer.file), nl=False)
    return ExitCode.DONE


def as_text(report: "FileReport") -> str:
    """A report as lines for a person. Names come from files: they are made printable."""
    lines = [f"{os.path.join(report.mountpoint, report.path)}: {_state(report)}"]
    if report.error:
        lines += [f"  error     {report.error}: {report.detail}", f"  meaning   {_meaning(report)}"]
        if report.error_age_s is not None:
            lines.append(f"  met       {_ago(report.error_age_s)}")
    if report.decrypted_age_s is not None:
        lines.append(f"  decrypted {_ago(report.decrypted_age_s)}")
    if report.opened_age_s is not None and report.view != "ramfs":
        how = ", from what was held, without asking KMS" if report.from_cache else ""
        lines.append(f"  opened    {_ago(report.opened_age_s)}{how}")
    version = "" if report.version is None else f", version {report.version}"
    lines.append(f"  format    {report.format}{version}")
    key = report.key_arn or (report.call.key_id if report.call is not None else None)
    if key is not None:
        lines.append(f"  key       {key}")
    if report.call is not None:
        lines += _call(report.call, report.credential_source)
    if report.hint:
        lines.append(f"  to do     {report.hint}")
    return "".join(messages.printable(line) + "\n" for line in lines)


def _state(report: "FileReport") -> str:
    match report.state:
        case "served":
            return "served, held in memory" if report.held else "served"
        case "stale":
            return "served as it was, since KMS cannot be asked again"
        case "failing":
            return "cannot be read"
        case "locked":
            return "cannot be read: the volume is locked (`kmsfs unlock`)"
        case "not asked for":
            return "not asked for yet"


def _meaning(report: "FileReport") -> str:
    """What an error is, in the words of its class."""
    described = type(from_code(report.error, report.detail)).__doc__ or report.error
    return described.partition("\n")[0]


def _call(call: "KmsCall", credential_source: str | None) -> list[str]:
    known = [
        call.principal,
        f"access key {call.access_key_id}" if call.access_key_id is not None else None,
        f"credentials: {credential_source}" if credential_source is not None else None,
    ]
    lines = [f"  asked by  {', '.join(text for text in known if text is not None)}"]
    if call.request_id is not None:
        lines.append(f"  request   {call.request_id}")
    return lines


def _ago(seconds: float) -> str:
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s ago"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min ago"
    return f"{seconds / _HOUR_S:.1f} h ago"
