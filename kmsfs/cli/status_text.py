"""What `kmsfs status` shows, as lines for a person. Names come from files: they are printable."""

from kmsfs.admin.security import SecurityReport
from kmsfs.admin.status import MountStatus, RamStatus, UnattendedStatus
from kmsfs.cli import messages


def as_text(record: MountStatus | UnattendedStatus | SecurityReport) -> str:
    """One mount, in lines."""
    match record:
        case MountStatus():
            return _mount(record)
        case UnattendedStatus():
            return _unattended(record)
        case SecurityReport():
            return _security(record)


def _security(report: SecurityReport) -> str:
    lines = [f"{report.mountpoint}: {report.grade}"]
    for finding in report.findings:
        lines += [f"  {finding.grade:8} {finding.promise}", f"           {finding.evidence}"]
        if finding.todo:
            lines.append(f"           to do: {finding.todo}")
    return "".join(messages.printable(line) + "\n" for line in lines)


def _unattended(record: UnattendedStatus) -> str:
    lines = (
        f"{record.mountpoint}: {record.source} ({record.view} view)",
        "  state    filled and left: no process keeps it in step with the source",
    )
    return "".join(messages.printable(line) + "\n" for line in lines)


def _mount(record: MountStatus) -> str:
    """A mount as lines for a person. Names come from files: they are made printable."""
    volume = f", volume {record.volume}" if record.volume else ""
    used = f"{record.cached_bytes} of {record.budget_bytes}"
    lines = [
        f"{record.mountpoint}: {record.source} ({record.view} view{volume})",
        f"  state    {'LOCKED' if record.locked else 'serving'}",
        f"  served   {_files(record.served)}",
        f"  cached   {_files(record.cached_count)}, {used} bytes",
    ]
    if record.view_reason:
        lines.insert(1, f"  view     ramfs, since FUSE cannot be used: {record.view_reason}")
    if record.ram is not None:
        lines[-1:] = _ram_lines(record.ram)
    lines += [
        f"    {entry.path}: {entry.size_bytes} bytes, {entry.age_s:.0f} s old"
        + (", open" if entry.open_by else "")
        + (f" {entry.open_by} times" if entry.open_by > 1 else "")
        for entry in record.cached
    ]
    if record.ram is None and record.stale_count:
        lines.append(
            f"  stale    {_files(record.stale_count)}, held past ttl_s: "
            "served only while KMS cannot be asked again"
        )
        lines += [
            f"    {entry.path}: {entry.age_s:.0f} s old" for entry in record.cached if entry.stale
        ]
    lines.append(f"  ignored  {_files(record.ignored_count)}")
    lines += [f"    {item.path}: {item.reason}" for item in record.ignored]
    lines.append(f"  unbound  {_files(record.unbound_count)}")
    lines += [f"    {path}" for path in record.unbound]
    lines.append(f"  failing  {_files(record.failing_count)}")
    for item in record.failing:
        lines.append(f"    {item.path}: {item.reason}")
        if item.hint:
            lines.append(f"      hint: {item.hint}")
    for key in record.away:
        when = f"again in {key.again_in_s:.1f} s" if key.again_in_s else "again at the next open"
        lines.append(f"  away     KMS for {key.key}: {key.failures} failures in a row, {when}")
        lines.append(f"    {key.reason}")
    for hook in record.hooks:
        lines.append(f"  hook     {hook.match}: {' '.join(hook.run)}")
        lines.append(f"    {_times('run', hook.runs)}, {_times('failed', hook.failures)}")
        if hook.problem:
            lines.append(f"    the last time: {hook.problem}")
    if record.audit is not None:
        needed = ", required" if record.audit.required else ""
        lines.append(f"  audit    {record.audit.file}{needed}")
        if record.audit.problem:
            lines.append(f"    cannot be written: {record.audit.problem}")
    memory = ", ".join(record.plaintext_in) or ("none held" if record.ram is None else "ramfs")
    lines.append(f"  memory   {memory}")
    credentials = record.credential_source or "not looked for yet"
    lines.append(f"  keys     {', '.join(record.key_ids) or 'any'} (credentials: {credentials})")
    lines += [f"  weaker   {text}" for text in record.weaknesses]
    return "".join(messages.printable(line) + "\n" for line in lines)


def _ram_lines(ram: RamStatus) -> list[str]:
    used = f"{ram.size_bytes} of {ram.limit_bytes} bytes"
    lines = [f"  {ram.kind:8} {_files(ram.files)}, {used}, decrypted at mount and at each change"]
    if ram.stale:
        lines.append(f"  stale    {_files(len(ram.stale))}, kept until KMS can be asked again")
        lines += [f"    {item.path}: {item.reason}" for item in ram.stale]
    if ram.held:
        lines.append(f"  held     {_files(len(ram.held))}, taken away and open in a program")
        lines += [f"    {item.path}" for item in ram.held]
    return lines


def _times(what: str, count: int) -> str:
    return f"{what} once" if count == 1 else f"{what} {count} times"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
