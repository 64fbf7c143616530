"""What confinement, secret memory and scrubbing cost, beside the same code without them."""

import gc
import sys
from pathlib import Path

from tests.benchmark.bench import Result, median_ms, read_whole, running_kms, site_of, timed
from tests.support.commands import run_kmsfs
from tests.support.mounts import MountedVolume
from tests.support.sites import Site

_UNPROTECTED = (sys.executable, "-m", "tests.support.unprotected")

_FIRST_READS = 120
_WARM_READS = 5000
_BLOCK = 50


def measure(directory: Path) -> list[Result]:
    """Both mounts in one run, read in turns."""
    with running_kms() as kms, site_of(kms, directory) as site:
        return _compare(site)


def _compare(site: Site) -> list[Result]:
    for number in range(_FIRST_READS):
        site.write(f"file-{number}.encrypted", site.blob(site.secret(f"file {number}", 1000)))
    protected = site.mount(path=site.directory / "protected")
    unprotected = _mount_unprotected(site, site.directory / "unprotected")
    mounts = (protected, unprotected)
    first: tuple[list[float], list[float]] = ([], [])
    warm: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for number in range(_FIRST_READS):
        # Each of them goes first half of the time.
        for at in (0, 1) if number % 2 else (1, 0):
            path = mounts[at].path / f"file-{number}"
            first[at].append(timed(lambda path=path: read_whole(path)))
    _check(protected, on=True)
    _check(unprotected, on=False)
    for _ in range(_WARM_READS // _BLOCK):
        for at in (0, 1):
            path = mounts[at].path / "file-0"
            warm[at].extend(timed(lambda path=path: read_whole(path)) for _ in range(_BLOCK))
    gc.enable()
    # The first ones of all wait for a zygote and a worker.
    with_it, without = median_ms(first[0][10:]), median_ms(first[1][10:])
    first_detail = f"without {without:.2f} ms, with {with_it:.2f} ms"
    warm_with, warm_without = median_ms(warm[0]), median_ms(warm[1])
    warm_detail = f"without {warm_without * 1000:.0f} us, with {warm_with * 1000:.0f} us"
    return [
        Result("warm open+read+close, protected", warm_with / warm_without, 1.15, "x", warm_detail),
        Result("first read, protected, above", with_it - without, 2.0, " ms", first_detail),
    ]


def _check(volume: MountedVolume, *, on: bool) -> None:
    """That what is compared is what the lines say."""
    status = volume.status()
    assert status["daemon"]["sandbox"]["seccomp"] == on
    assert status["workers"]["sandbox"]["seccomp"] == on
    assert status["workers"]["allocator_scrubs"] == on
    assert status["plaintext_in"] == ["memfd_secret" if on else "memfd"]


def _mount_unprotected(site: Site, mountpoint: Path) -> MountedVolume:
    mountpoint.mkdir()
    arguments = ["mount", site.source, mountpoint, "--key-id", site.key_arn]
    run_kmsfs(arguments, env=site.env, prefix=_UNPROTECTED)
    volume = MountedVolume(site.source, mountpoint, site.env)
    site.mounter.mounted.append(volume)
    return volume
