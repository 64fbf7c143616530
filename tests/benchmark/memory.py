"""What an idle mount costs of memory: daemon and zygote, without a worker."""

from pathlib import Path

from tests.benchmark.bench import Result, running_kms, site_of, wait_without_workers
from tests.support.mounts import wait_until


def measure(directory: Path) -> list[Result]:
    """Proportional set sizes after a first read, once its worker has ended."""
    with running_kms() as kms, site_of(kms, directory) as site:
        site.make_volume()
        site.encrypt("file", site.secret("file", 1000))
        volume = site.mount()
        (volume.path / "file").read_bytes()
        wait_without_workers(volume)
        wait_until(lambda: volume.status()["zygote_pid"] is not None, "the zygote is there")
        status = volume.status()
        daemon = pss_mb(status["daemon_pid"])
        zygote = pss_mb(status["zygote_pid"])
        launcher = pss_mb(volume.launcher_pid)
    detail = (
        f"daemon {daemon:.1f} MB, zygote {zygote:.1f} MB, which ending it while idle would save; "
        f"launcher {launcher:.1f} MB"
    )
    return [Result("idle mount, PSS of daemon and zygote", daemon + zygote, 90, " MB", detail)]


def pss_mb(pid: int) -> float:
    """Pss of /proc/PID/smaps_rollup: shared pages count by their share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("no Pss line")
