"""One run: a volume, its mount, readers, and everything that happens to them."""

import collections
import contextlib
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from tests.chaos.content import Contents
from tests.chaos.files import BARE_PATTERN, ChaosFile, Ciphertexts, make_files
from tests.chaos.mounted import ChaosMount, locked_bytes
from tests.chaos.mutator import Mutator
from tests.chaos.reader import ReaderJob, Tally
from tests.chaos.table import Table
from tests.chaos.trouble import Killer, Operator, Outages, Troublemaker
from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Mounter
from tests.support.sites import StrictSite
from tests.support.strict_kms import StrictKms

REPOSITORY: Final = Path(__file__).parents[2]

READERS: Final = 4
_BOUND, _BARE = 24, 8
_KEYS = 2

# Short times, so that KMS is asked again and again.
_SETTINGS = """deadline_s = 2.0
[cache]
ttl_s = {ttl_s}
idle_s = 2.0
stale_s = 2.0
"""
_TTL_S = {"fuse": 4.0, "ramfs": 0.0}

# Promised is the volume's deadline; the rest is for a machine that is busy otherwise.
_OPEN_WITHIN_S = 2.0 + 8.0

# All at once for so long, then everything is mended, and all files must be right again within
# the second, which is for a busy machine as well; then nothing may fail for the third.
_ROUND_S = 12.0
_HEALED_WITHIN_S = 20.0
_CALM_S = 1.0

_ENDS_WITHIN_S = 30.0


@dataclass
class Report:
    """What a run came to.

    Attributes:
        done: what was done to the mount, and how often.
        slowest_recovery_s: from the last change after a round until every file was seen as it is.
    """

    seed: int
    view: str
    seconds: float
    tally: Tally = field(default_factory=Tally)
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest_recovery_s: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What must not have been; empty for a good run."""
        return self.tally.problems

    def __str__(self) -> str:
        tally = self.tally
        lines = [
            f"chaos, {self.view} view, seed {self.seed}, {self.seconds:.0f} s",
            f"  reads {tally.reads}, successful {tally.successes}, wrong {tally.wrong}",
            f"  errors {_counts(tally.errors)}",
            f"  done {_counts(self.done)}",
            f"  slowest open {tally.slowest_open_s:.2f} s",
            f"  slowest recovery {self.slowest_recovery_s:.2f} s",
        ]
        if self.problems:
            lines += [f"  BROKEN, again with --view {self.view} --seed {self.seed}:"]
            lines += [f"    {problem}" for problem in self.problems]
        return "\n".join(lines)


def run(directory: Path, *, view: str, seed: int, seconds: float) -> Report:
    """Run in a new directory for so long, and the time that mending takes.

    Raises:
        AssertionError: it could not be mounted or locked at all.
    """
    directory.mkdir(parents=True)
    report = Report(seed, view, seconds)
    with StrictKms() as kms, FaultProxy(kms.endpoint_url) as proxy:
        keys = [kms.create_key() for _ in range(_KEYS)]
        env = {**kms.env(), "AWS_ENDPOINT_URL": proxy.endpoint_url}
        mounter = Mounter(env)
        site = StrictSite(directory, env, keys[0].arn, kms.client(), mounter, kms, keys[0])
        site.make_volume(BARE_PATTERN, key_ids=tuple(key.arn for key in keys))
        site.append_config(_SETTINGS.format(ttl_s=_TTL_S[view]))
        try:
            chaos = _Run(site, proxy, make_files(_BOUND, _BARE, keys), report)
            chaos.go()
        finally:
            kms.heal()
            proxy.heal()
            report.problems.extend(mounter.clean_up())
        report.problems.extend(f"left behind: {left}" for left in chaos.mount.leftovers())
    return report


class _Run:
    """Everything that takes part in one run."""

    def __init__(
        self, site: StrictSite, proxy: FaultProxy, files: list[ChaosFile], report: Report
    ) -> None:
        view, seed = report.view, report.seed
        self._files = files
        self._report = report
        self._contents = Contents([file.base_bytes for file in files])
        self._pause = select.poll()
        self._table = Table.create(site.directory / "table", len(files))
        ciphertexts = Ciphertexts(site.source, site.directory / "staging")
        guard = threading.Lock()
        self._mutator = Mutator(
            files,
            ciphertexts,
            self._table,
            site.directory / "mnt",
            seed=f"{seed} mutator",
            seen_at_open=view == "fuse",
            rollback_guard=guard,
        )
        self._mutator.fill()
        self.mount = ChaosMount(site, view, dict(site.env))
        fuse = view == "fuse"
        killer = Killer(
            self.mount,
            self._table,
            seed=f"{seed} killer",
            pause_s=0.8,
            rollback_guard=guard if fuse else None,
        )
        outages = Outages(
            site.kms,
            [file.key for file in files[:_KEYS]],
            proxy,
            self._table,
            seed=f"{seed} outages",
            pause_s=1.2,
        )
        operator = Operator(
            self.mount,
            files,
            self._table,
            seed=f"{seed} operator",
            pause_s=1.5,
            rollback_guard=None if fuse else guard,
        )
        self._actors: list[Mutator | Troublemaker] = [self._mutator, killer, outages, operator]
        self._job = ReaderJob(
            table=str(site.directory / "table"),
            mountpoint=str(self.mount.path),
            view=view,
            seed=str(seed),
            open_within_s=_OPEN_WITHIN_S,
            names=[file.name for file in files],
            base_sizes=[file.base_bytes for file in files],
        )

    def go(self) -> None:
        """Rounds of chaos, each with a calm after it; then lock and see what is left."""
        nothing_held_bytes = self._locked_bytes()
        ends_at = time.monotonic() + self._report.seconds
        with self._readers() as readers:
            while (left_s := ends_at - time.monotonic()) > 0 and not self._report.problems:
                self._round(min(_ROUND_S, left_s))
                self._recover()
            self._table.stop()
            self._collect(readers)
        for actor in self._actors:
            self._report.done.update(actor.done)
        if not self._report.problems:
            self._check_lock(nothing_held_bytes)

    def _round(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        with ThreadPoolExecutor(len(self._actors)) as pool:
            for future in [pool.submit(actor.run, ends_at) for actor in self._actors]:
                try:
                    future.result()
                except AssertionError as error:
                    # What has to come to an end, such as a restart, and did not.
                    self._report.tally.note_problem(str(error))

    def _recover(self) -> None:
        """Change some files, wait until every one is served as it is, then for a calm."""
        self._mutator.rotate_some()
        started = time.monotonic()
        for file in self._files:
            # By any reader, from now on.
            while (problem := self._problem_with(file)) is not None:
                if time.monotonic() - started > _HEALED_WITHIN_S:
                    self._report.tally.note_problem(
                        f"not served {_HEALED_WITHIN_S:.0f} s after all was mended: {problem}"
                    )
                    return
                self._pause.poll(10)
            self._table.files[file.index].floor = file.version
        elapsed_s = time.monotonic() - started
        self._report.slowest_recovery_s = max(self._report.slowest_recovery_s, elapsed_s)
        self._table.change_calm()
        self._pause.poll(_CALM_S * 1000)
        self._table.change_calm()

    def _problem_with(self, file: ChaosFile) -> str | None:
        """What is wrong with a file; None if it is served in the version that is in place."""
        try:
            read = (self.mount.path / file.name).read_bytes()
        except OSError as error:
            return f"{file.name}: {error.strerror}"
        if read != self._contents.of(file.index, file.version):
            return f"{file.name}: not version {file.version}"
        return None

    # --- readers ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _readers(self) -> Iterator[Sequence["subprocess.Popen[str]"]]:
        readers = []
        try:
            for number in range(READERS):
                job = {**asdict(self._job), "seed": f"{self._job.seed} reader {number}"}
                readers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.chaos.reader", json.dumps(job)],
                        cwd=REPOSITORY,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            yield readers
        finally:
            for reader in readers:
                reader.kill()
                reader.communicate()

    def _collect(self, readers: Sequence["subprocess.Popen[str]"]) -> None:
        tally = self._report.tally
        for number, reader in enumerate(readers):
            try:
                output, _ = reader.communicate(timeout=_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                tally.note_problem(f"reader {number} hangs")
                continue
            if reader.returncode != 0:
                tally.note_problem(f"reader {number} ended with {reader.returncode}")
            else:
                tally.add(json.loads(output))

    # --- lock ------------------------------------------------------------------------------------

    def _locked_bytes(self) -> int:
        """Locked memory of the daemon while it holds nothing."""
        self.mount.volume.kmsfs("lock", self.mount.path)
        (daemon_pid,) = self.mount.pids("kmsfs-daemon")
        found = locked_bytes(daemon_pid)
        self.mount.volume.kmsfs("unlock", self.mount.path)
        return found

    def _check_lock(self, nothing_held_bytes: int) -> None:
        locked = self._locked_bytes()
        if locked != nothing_held_bytes:
            self._report.tally.note_problem(
                f"{locked} bytes are locked after lock, {nothing_held_bytes} were at first"
            )


def _counts(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"
