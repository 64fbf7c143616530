"""The FUSE view: an adapter between pyfuse3 and the volume. Inodes and errnos, nothing else."""

import errno
import functools
import itertools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from kmsfs.errors import KmsfsError, SourceMissing
from kmsfs.events import Event, EventSink, OpenRefused
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.mapping import LockedMapping
from kmsfs.store.known import KnownTree
from kmsfs.store.source import SourceDirectory, SourceFile, SourceNode
from kmsfs.store.volume import OpenedFile, Volume
from kmsfs.views import fuse_loop, fuse_xattrs
from kmsfs.views.fuse_pages import KernelPages
from kmsfs.views.fuse_record import opened_by, record_open
from kmsfs.views.inodes import ROOT_NUMBER, Inode, InodeTable, same_version
from kmsfs.views.prefetch import Prefetch, open_once
from kmsfs.views.serving import Auditor, HeldFile, Progress, Ready

# The largest read that the kernel asks for (FUSE_MAX_MAX_PAGES pages).
MAX_READ_BYTES: Final = 256 * PAGE_BYTES

# How long the kernel may believe names and attributes: a change in the source is seen within
# twice this.
_TIMEOUT_S: Final = 1.0

_BLOCK_BYTES: Final = 512  # unit of st_blocks, stat(2)

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


def handler(
    call: Callable[Concatenate["FuseView", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["FuseView", P], Coroutine[Any, Any, T]]:
    """Turn everything a handler can raise into an errno; anything else would end the mount.

    trio.Cancelled is a BaseException and passes.
    """

    @functools.wraps(call)
    async def wrapped(view: "FuseView", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(view, *args, **kwargs)
        except FUSEError:
            raise
        except KmsfsError as error:
            raise FUSEError(error.errno) from None
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except trio.TooSlowError:
            raise FUSEError(errno.ETIMEDOUT) from None
        except Exception as error:  # noqa: BLE001 - one bad request must not end the mount
            # The class name only: a foreign exception's text may hold content.
            log.error("%s failed: %s", call.__name__, type(error).__name__)  # noqa: TRY400
            raise FUSEError(errno.EIO) from None

    return wrapped


@dataclass(frozen=True, slots=True)
class _Handle:
    inode: Inode
    opened: OpenedFile


class FuseView(pyfuse3.Operations):
    """Serves a volume read-only.

    It also listens to events: when a plaintext is wiped, pages the kernel may have cached of it
    (by a private mmap) are dropped, by a task of `serve`.

    Args:
        fuse_fd: /dev/fuse of a mount that somebody else made; the view's from now on.
        open_deadline_s: within which every open ends.
        prefetch: what is decrypted before anybody opens it.
        audit: told of each open before its program has the descriptor; may refuse it.
        allow_unlocked: the reply buffer need not be locked.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        volume: Volume,
        events: EventSink,
        fuse_fd: int,
        *,
        open_deadline_s: float,
        prefetch: Prefetch,
        audit: Auditor | None = None,
        allow_unlocked: bool = False,
    ) -> None:
        super().__init__()
        self._prefetch = prefetch
        self._audit = audit
        self._volume = volume
        self._tree = KnownTree(volume)
        self._events = events
        self._open_deadline_s = open_deadline_s
        self._inodes = InodeTable(SourceDirectory(path="", mtime_ns=0))
        self._pages = KernelPages(self._inodes)
        self._handles: dict[int, _Handle] = {}
        self._listings: dict[int, list[SourceNode]] = {}
        self._next_handle = itertools.count(1)
        # /dev/fuse cannot take bytes out of memfd_secret; every reply passes through here.
        self._bounce = LockedMapping.anonymous(MAX_READ_BYTES, may_be_unlocked=allow_unlocked)
        self._bounce_view = self._bounce.borrow(MAX_READ_BYTES)
        self._bounce_used_bytes = 0
        self._token: trio.lowlevel.TrioToken | None = None
        fuse_loop.attach(self, fuse_fd)

    # --- what the composition root calls -------------------------------------------------------

    def emit(self, event: Event) -> None:
        """EventSink: note which files' pages the kernel must drop."""
        self._pages.emit(event)

    async def serve(self, ready: Ready, progress: Progress) -> None:
        """Serve until the mount is gone or `stop` is called."""
        await ready(await self._prefetch.before_ready(progress))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prefetch.in_background)
            nursery.start_soon(self._pages.drop_of_wiped)
            await fuse_loop.serve()
            nursery.cancel_scope.cancel()

    async def after_lock(self) -> tuple[HeldFile, ...]:
        """Drop what the kernel holds of plaintexts that are wiped."""
        self._wipe_reply_buffer()
        await self._pages.drop_all()
        return ()

    async def after_unlock(self) -> dict[str, KmsfsError]:
        """Files are decrypted when they are opened: nothing to do."""
        return {}

    async def reread(self, place: str, *, accept_older: bool) -> dict[str, KmsfsError]:
        """See `View.reread`: files are decrypted when they are opened, all but accepted ones."""
        self._volume.cache.retire(place)
        await self._pages.drop_all(place)
        if not accept_older:
            return {}
        paths = self._volume.versions.below(place)
        with self._volume.versions.accepting_older(paths):
            failed = await open_once(self._volume, paths)
        # One that was removed since is nobody's loss.
        return {p: error for p, error in failed.items() if not isinstance(error, SourceMissing)}

    async def detach(self) -> None:
        """Unmounted lazily: from now on hold only what is open."""
        self._volume.cache.detach()

    async def forget_what_changed(self, paths: Iterable[str]) -> None:
        """Have the kernel drop what it believes of files whose ciphertext has changed."""
        await self._pages.forget_changed(paths)

    def stop(self) -> None:
        """Have `serve` return; requests that come later are not answered."""
        fuse_loop.stop()

    def close(self) -> None:
        """Wipe the reply buffer and close /dev/fuse."""
        self._wipe_reply_buffer()
        fuse_loop.close()

    def _wipe_reply_buffer(self) -> None:
        """Overwrite what the last reply left in the reply buffer."""
        if self._bounce_used_bytes:
            self._bounce.wipe(self._bounce_used_bytes)
            self._bounce_used_bytes = 0

    # --- metadata ------------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: int, name: bytes, _ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name; see `Volume.look_up`."""
        parent = self._inode(parent_inode)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise FUSEError(errno.ENOENT) from None
        node = await self._tree.look_up(parent.path, text)
        if node is None:
            raise FUSEError(errno.ENOENT)
        inode = self._inodes.assign(node)
        inode.lookups += 1
        return self._attributes(inode.number, inode.node)

    @handler
    async def getattr(self, inode: int, _ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of the version that is open, or else of the newest."""
        return self._attributes(inode, await self._node_now(inode))

    @handler
    async def getxattr(self, inode: int, name: bytes, _ctx: pyfuse3.RequestContext) -> bytes:
        """One of `user.kmsfs.*`; programs also ask for others, which is answered at once."""
        if name.startswith(fuse_xattrs.PREFIX):
            value = (await self._known_of(inode)).get(name)
            if value is not None:
                return value
        raise FUSEError(errno.ENODATA)

    @handler
    async def listxattr(self, inode: int, _ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Names of the attributes that are known."""
        return list(await self._known_of(inode))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel drops references."""
        for number, lookups in inode_list:
            self._inodes.forget(number, lookups)

    @handler
    async def opendir(self, inode: int, _ctx: pyfuse3.RequestContext) -> int:
        """Take a snapshot of a directory."""
        path = self._inode(inode).path
        nodes = await self._tree.list_directory(path)
        handle = next(self._next_handle)
        self._listings[handle] = nodes
        return handle

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Names and attributes from the snapshot."""
        nodes = self._listings[fh]
        for index in range(start_id, len(nodes)):
            node = nodes[index]
            inode = self._inodes.assign(node)
            attributes = self._attributes(inode.number, inode.node)
            name = node.path.rpartition("/")[2].encode()
            if not pyfuse3.readdir_reply(token, name, attributes, index + 1):
                self._inodes.drop_unreferenced(inode)
                return
            inode.lookups += 1

    @handler
    async def releasedir(self, fh: int) -> None:
        """Drop a snapshot."""
        self._listings.pop(fh, None)

    @handler
    async def statfs(self, _ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The budget of locked memory, as blocks."""
        arena = self._volume.arena
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_BYTES
        data.f_blocks = arena.budget_bytes // PAGE_BYTES
        data.f_bfree = data.f_bavail = (arena.budget_bytes - arena.used_bytes) // PAGE_BYTES
        data.f_files = data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    # --- content -------------------------------------------------------------------------------

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Decrypt if need be; all errors of a file surface here."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        known = self._inode(inode)
        deadline = trio.current_time() + self._open_deadline_s
        who = {"uid": ctx.uid, "gid": ctx.gid, "pid": ctx.pid}
        try:
            opened = await self._volume.open_file(known.path, deadline)
            event = opened_by(opened, self._volume, **who)
            await record_open(event, opened, self._audit, deadline)
        except KmsfsError as error:
            self._events.emit(OpenRefused(path=known.path, error=error.code, **who))
            if isinstance(error, SourceMissing):
                raise FUSEError(errno.ESTALE) from None
            raise
        try:
            # It waits for the kernel, which may wait for others.
            with trio.fail_at(deadline):
                await self._make_way_for(known, opened.file)
        except BaseException:
            opened.lease.close()
            raise
        known.node = opened.file
        known.opens += 1
        handle = next(self._next_handle)
        self._handles[handle] = _Handle(known, opened)
        self._events.emit(event)
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    async def _make_way_for(self, known: Inode, file: SourceFile) -> None:
        """Have an inode's number ready to stand for the version that is being opened.

        The kernel still believes the size of the version that it was told of last: a program
        that asks for it after the open would cut the file short, or map what is not there.
        """
        while not same_version(known, file):
            if known.opens:
                # The kernel looks the name up again on ESTALE, and finds the new version's number.
                raise FUSEError(errno.ESTALE)
            believed = known.node
            await self._pages.forget_attributes(known.number)
            if known.opens == 0 and known.node is believed:
                return

    # No await between filling the reply buffer and returning: pyfuse3 replies without a
    # checkpoint, so nothing else can touch the buffer meanwhile.
    @handler
    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]
        """Copy a range of the slot into the reply buffer, which is wiped right after the reply.

        pyfuse3's type says bytes; it takes any contiguous buffer.
        """
        self._wipe_reply_buffer()
        count = self._handles[fh].opened.lease.copy_to(self._bounce, off, size)
        self._bounce_used_bytes = count
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        self._token.run_sync_soon(self._wipe_reply_buffer, idempotent=True)
        return self._bounce_view[:count]

    @handler
    async def release(self, fh: int) -> None:
        """Give the lease back."""
        handle = self._handles.pop(fh)
        handle.inode.opens -= 1
        handle.opened.lease.close()
        self._inodes.drop_unreferenced(handle.inode)

    # --- helpers -------------------------------------------------------------------------------

    async def _node_now(self, number: int) -> SourceNode:
        """What is known under a number: the version that is open, or else the newest."""
        known = self._inode(number)
        if known.opens == 0:
            node = await self._tree.node_at(known.path)
            if node is None or isinstance(node, SourceFile) != isinstance(known.node, SourceFile):
                raise FUSEError(errno.ENOENT)
            if known.opens == 0:
                known.node = node
        return known.node

    async def _known_of(self, number: int) -> dict[bytes, bytes]:
        node = await self._node_now(number)
        return fuse_xattrs.attributes_of(self._volume, node) if isinstance(node, SourceFile) else {}

    def _inode(self, number: int) -> Inode:
        inode = self._inodes.get(number)
        if inode is None:
            raise FUSEError(errno.ESTALE)
        return inode

    def _attributes(self, number: int, node: SourceNode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = number
        entry.entry_timeout = _TIMEOUT_S
        entry.attr_timeout = _TIMEOUT_S
        entry.st_blksize = PAGE_BYTES
        if isinstance(node, SourceDirectory):
            permissions = self._volume.policy.of_directory()
            entry.st_mode = stat.S_IFDIR | permissions.mode
            # 1: link counts of directories are not kept, which find(1) understands.
            entry.st_nlink = 2 if number == ROOT_NUMBER else 1
            mtime_ns = node.mtime_ns
        else:
            permissions = self._volume.policy.of_file(node.path)
            entry.st_mode = stat.S_IFREG | permissions.mode
            entry.st_nlink = 1
            entry.st_size = node.size_bytes
            entry.st_blocks = -(-node.size_bytes // _BLOCK_BYTES)
            if not node.size_exact:
                # An estimate must not be believed for a moment: cp and tar would cut the file.
                entry.attr_timeout = 0
            mtime_ns = node.version[3]
        entry.st_uid = permissions.uid
        entry.st_gid = permissions.gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
        return entry
