"""What readers wait for while KMS is away, and how soon its return is noticed."""

import select
import time
from pathlib import Path

from tests.benchmark.bench import (
    Kms,
    Result,
    median_ms,
    read_whole,
    running_kms,
    site_of,
    timed,
)
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import MountedVolume
from tests.support.sites import Site

_OPENS = 100
_CACHED_READS = 200
_RETURNS = 12
_DEADLINE_S = 8.0


def measure(directory: Path) -> list[Result]:
    """A KMS that answers nobody, then errors only; files held and not held."""
    results = []
    with running_kms() as kms:
        for fault in (Fault.HANG, Fault.ERROR_503):
            with FaultProxy(kms.endpoint_url) as proxy:
                results += _outage(kms, proxy, fault, directory / fault.name)
    return results


def _outage(kms: Kms, proxy: FaultProxy, fault: Fault, directory: Path) -> list[Result]:
    directory.parent.mkdir(exist_ok=True)
    with site_of(kms, directory) as site:
        for number in range(_OPENS + _RETURNS):
            site.write(f"file-{number}.encrypted", site.blob(site.secret(f"file {number}", 500)))
        site.write("held.encrypted", site.blob(site.secret("held", 500)))
        volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": proxy.endpoint_url})
        before = _cached_ms(volume)
        proxy.inject(fault)
        opens = [timed(lambda n=n: _fails(volume, n)) for n in range(_OPENS)]
        during = _cached_ms(volume)
        quick = sorted(opens[3:])
        returns = [_return_s(site, volume, proxy, fault, _OPENS + n) for n in range(_RETURNS)]
    name = f"KMS away ({fault.name})"
    waits = ", ".join(f"{seconds:.2f}" for seconds in opens[:4])
    probes = sum(seconds > 0.05 for seconds in opens[3:])
    return [
        Result(f"{name}: first open", opens[0], _DEADLINE_S, " s", f"the first four: {waits} s"),
        Result(
            f"{name}: open after the third, median",
            quick[len(quick) // 2] * 1000,
            50.0,
            " ms",
            f"the hundredth {opens[-1] * 1000:.1f} ms; {probes} of {len(quick)} were probes, "
            f"the longest {quick[-1]:.2f} s",
        ),
        Result(f"{name}: held file, ratio to before", during / before, 1.5, "",
               f"{before:.2f} ms before, {during:.2f} ms during"),
        Result(
            f"{name}: served after its return, worst of {_RETURNS}",
            max(returns),
            2.0,
            " s",
            f"mean {sum(returns) / len(returns):.2f} s",
        ),
    ]  # fmt: skip


def _cached_ms(volume: MountedVolume) -> float:
    read_whole(volume.path / "held")
    return median_ms(
        [timed(lambda: read_whole(volume.path / "held")) for _ in range(_CACHED_READS)]
    )


def _fails(volume: MountedVolume, number: int) -> bool:
    try:
        read_whole(volume.path / f"file-{number}")
    except OSError:
        return True
    return False


def _return_s(
    site: Site, volume: MountedVolume, proxy: FaultProxy, fault: Fault, number: int
) -> float:
    """Seconds from KMS's return until a reader that tries all the time is served."""
    pause = select.poll()
    while not volume.status()["away"]:
        proxy.inject(fault)
        # Of files that were read no longer than this ago the plaintext is held.
        site.write(f"file-{number}.encrypted", site.blob(site.secret(f"{number}", 500)))
        _fails(volume, number)
    # At any moment of the probes.
    ends_at = time.monotonic() + 3.0 * number / _RETURNS % 3.0 + 0.5
    while time.monotonic() < ends_at:
        _fails(volume, number)
        pause.poll(5)
    proxy.heal()
    started = time.monotonic()
    while _fails(volume, number):
        pause.poll(5)
    return time.monotonic() - started
