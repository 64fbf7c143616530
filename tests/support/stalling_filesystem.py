"""A FUSE filesystem that shows a directory, and stops answering when it is told to.

It stands for a network filesystem whose server is away. It runs in a process of its own, and
answers everything and ends when that process's standard input is closed, whatever happened.
"""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from kmsfs.views import mountpoint as mounts

ROOT = Path(__file__).parents[2]


class StallingFilesystem:
    """The mounted filesystem, as the test that told it to stall sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def stall(self) -> None:
        """Answer nothing from now on."""
        self._tell("stall")

    def go_on(self) -> None:
        """Answer what was asked meanwhile, and everything after."""
        self._tell("go on")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == f"{word}\n"


@contextlib.contextmanager
def stalling_filesystem(backing: Path, mountpoint: Path) -> Iterator[StallingFilesystem]:
    """Show `backing`, read-only, at `mountpoint`. In the end it answers, and is unmounted."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, backing, mountpoint],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        yield StallingFilesystem(process)
    finally:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        while mounts.find_mount(str(mountpoint)) is not None:
            mounts.unmount(str(mountpoint), lazy=True)


class _Passthrough(pyfuse3.Operations):
    """Serves a directory; every request waits while it stalls."""

    def __init__(self, backing: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: backing}
        self._numbers = {backing: int(pyfuse3.ROOT_INODE)}
        self.answering = trio.Event()
        self.answering.set()

    def _number(self, path: str) -> int:
        number = self._numbers.setdefault(path, len(self._numbers) + 1)
        self._paths[pyfuse3.InodeT(number)] = path
        return number

    def _attributes(self, path: str) -> pyfuse3.EntryAttributes:
        try:
            info = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        entry = pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size"):
            setattr(entry, name, getattr(info, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(info, name))
        entry.st_ino = pyfuse3.InodeT(self._number(path))
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        await self.answering.wait()
        return self._attributes(
            os.path.join(self._paths[pyfuse3.InodeT(parent_inode)], os.fsdecode(name))
        )

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        await self.answering.wait()
        return self._attributes(self._paths[pyfuse3.InodeT(inode)])

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        await self.answering.wait()
        fd = os.open(self._paths[pyfuse3.InodeT(inode)], os.O_RDONLY)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd), direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self.answering.wait()
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def opendir(self, inode: int, ctx: Any) -> Any:
        await self.answering.wait()
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        await self.answering.wait()
        path = self._paths[pyfuse3.InodeT(fh)]
        for index, name in enumerate(sorted(os.listdir(path))):
            if index >= start_id:
                attributes = self._attributes(os.path.join(path, name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, index + 1):
                    return

    async def releasedir(self, fh: int) -> None:
        pass

    async def statfs(self, ctx: Any) -> Any:
        return pyfuse3.StatvfsData()


async def _obey(served: _Passthrough) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("mounted", flush=True)
        while word := (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
            if word == "stall":
                served.answering = trio.Event()
            else:
                served.answering.set()
            print(word, flush=True)
        served.answering.set()
        # What waited is answered before it goes.
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    import trio.testing

    passthrough = _Passthrough(sys.argv[1])
    pyfuse3.init(passthrough, sys.argv[2], {"fsname=stalling", "default_permissions"})
    try:
        trio.run(_obey, passthrough)
    finally:
        pyfuse3.close(unmount=True)
