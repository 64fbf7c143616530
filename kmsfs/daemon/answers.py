"""What a mount says of itself on its control socket: of its view and its volume together."""

from typing import Final

import trio

from kmsfs.admin import control, explain
from kmsfs.admin.status import FileReport, HeldPlaintext, RamStatus, named_problems
from kmsfs.decryptor.client import DecryptorClient
from kmsfs.settings import MountConfig
from kmsfs.store.volume import Volume
from kmsfs.views.ram import RamView
from kmsfs.views.serving import HeldFile, View

REFILL_S: Final = 0.8 * control.ANSWER_S
"""Of the time that an answer may take, the part for decrypting files."""


def ram_status(config: MountConfig, view: View) -> RamStatus | None:
    """What the ramfs view says of itself; None for the other."""
    if not isinstance(view, RamView):
        return None
    return RamStatus(
        kind=config.ram.kind,
        swappable=view.is_swappable,
        files=len(view.shown),
        size_bytes=view.size_bytes,
        limit_bytes=config.cache.max_bytes,
        stale=named_problems(view.stale),
        held=held_records(view.held),
        problem=view.problem,
    )


def held_records(held: tuple[HeldFile, ...]) -> tuple[HeldPlaintext, ...]:
    """Files that were taken away while programs held them."""
    return tuple(HeldPlaintext(path=file.path, old_path=file.old_path) for file in held)


async def refreshed(
    volume: Volume, view: View, request: control.RefreshRequest
) -> control.Refreshed:
    """Have KMS asked again for what is served at or below a path.

    Raises:
        VolumeLocked, SourceMissing: nothing is, now or at all.
        KmsfsError: the view cannot be filled.
    """
    await volume.check_readable(request.path)
    with trio.move_on_after(REFILL_S):
        failed = await view.reread(request.path, accept_older=request.accept_older)
        return control.Refreshed(failed=named_problems(failed))
    return control.Refreshed(finished=False)


async def explained(
    config: MountConfig, volume: Volume, client: DecryptorClient, view: View, path: str
) -> FileReport:
    """What the last open of a file met.

    Raises: see `explain.gather`.
    """
    shown = view.shown.get(path) if isinstance(view, RamView) else None
    greeting = client.workers.greeting
    return await explain.gather(
        config,
        volume,
        path,
        in_ram_since_s=None if shown is None else shown.decrypted_at_s,
        credential_source=None if greeting is None else greeting.credential_source,
    )
