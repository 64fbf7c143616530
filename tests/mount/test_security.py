"""What `status --security` finds, and what `--strict` refuses: evidence from a real machine."""

import json
import mmap
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.commands import KMSFS, run_kmsfs
from tests.support.mounts import MountedVolume, processes_of, strerror_of_cat, wait_until
from tests.support.sites import Site

PROMISES = 10


LOCKABLE = '[cache]\nmax_bytes = "2MiB"\nmax_file_bytes = "1MiB"\n'
"""As much as can be locked under the limit that most machines have."""


@pytest.fixture
def volume(site: Site) -> MountedVolume:
    """A mount with one file, `key`, that has been read."""
    site.make_volume()
    site.append_config(LOCKABLE)
    site.encrypt("key", site.secret("key", 5000))
    mounted = site.mount()
    assert len((mounted.path / "key").read_bytes()) == 5000
    return mounted


def findings(volume: MountedVolume) -> dict[str, dict[str, Any]]:
    """What is found, by the first words of the promise."""
    shown = json.loads(volume.kmsfs("status", volume.path, "--security", "--json").output)
    return {item["promise"]: item for item in shown["findings"]}


def of(found: dict[str, dict[str, Any]], words: str) -> dict[str, Any]:
    """The one finding whose promise has these words."""
    (finding,) = [item for promise, item in found.items() if words in promise]
    return finding


def test_each_promise_is_shown_with_evidence_and_what_to_do(volume: MountedVolume) -> None:
    found = findings(volume)
    assert len(found) == PROMISES
    for finding in found.values():
        assert finding["grade"] in ("good", "weak", "broken")
        assert finding["evidence"]
        assert (finding["todo"] == "") or finding["grade"] != "good"
    text = volume.kmsfs("status", volume.path, "--security").output
    for promise, finding in found.items():
        assert f"  {finding['grade']:8} {promise}\n" in text
        if finding["todo"]:
            assert f"to do: {finding['todo']}\n" in text


def test_evidence_is_what_the_kernel_says(volume: MountedVolume) -> None:
    found = findings(volume)
    memory = of(found, "memory that is locked")
    assert memory["grade"] == "good"
    assert memory["evidence"].startswith("memfd_secret; VmLck ")
    locked_kib = int(memory["evidence"].partition("VmLck ")[2].split()[0])
    assert locked_kib >= 8
    assert of(found, "dumped or traced")["grade"] == "good"
    assert of(found, "no AWS credentials")["grade"] == "good"
    assert of(found, "a role")["grade"] == "weak"
    zeroing = of(found, "zeroed")
    with open("/proc/cmdline") as cmdline:
        assert ("init_on_free=1" in cmdline.read()) == (zeroing["grade"] == "good")


def test_the_filesystem_of_a_ramfs_is_told_by_its_magic_number(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    finding = of(findings(site.mount("--view", "ramfs")), "never swapped")
    assert finding["grade"] == "good"
    assert finding["evidence"].startswith("ramfs (0x858458f6), 1 files")


def test_a_program_that_maps_a_file_is_named(volume: MountedVolume) -> None:
    assert of(findings(volume), "page cache")["grade"] == "good"
    with (volume.path / "key").open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        try:
            assert view[0:1]
            finding = of(findings(volume), "page cache")
        finally:
            view.close()
    assert finding["grade"] == "weak"
    assert f"(pid {os.getpid()})" in finding["evidence"]


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_strict_refuses_what_is_weak_in_the_words_of_status(site: Site, view: str) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    weak = [
        finding for finding in findings(site.mount("--view", view)).values()
        if finding["grade"] != "good"
    ]  # fmt: skip
    assert weak != []
    path = site.directory / "strict"
    path.mkdir()
    arguments = ["mount", site.source, path, "--view", view, "--strict"]
    done = run_kmsfs(arguments, env=site.env, exit_code=6)
    for finding in weak:
        assert f"kmsfs: error: {finding['grade']}: {finding['promise']}: " in done.stderr
        assert f"kmsfs: hint: {finding['todo']}\n" in done.stderr
    assert "not hold in full, and --strict asks for it" in done.stderr
    assert os.listdir(path) == []
    assert processes_of(path) == []


ALL_GOOD = """
set -e
printf 'quiet init_on_free=1' > "$1/cmdline"
mount --bind "$1/cmdline" /proc/cmdline
set +e
"$PYTHON" -m kmsfs mount "$2" "$3" --strict --profile role --foreground &
launcher=$!
for _ in $(seq 400); do [ -e "$3/key" ] && break; kill -0 $launcher || exit 9; sleep 0.05; done
wc -c < "$3/key"
"$PYTHON" -m kmsfs status "$3" --security
kill $launcher
wait $launcher
"""


@pytest.mark.plaintext_on("files")
def test_strict_mounts_where_every_promise_holds(site: Site) -> None:
    """Where the kernel zeroes freed pages and a process supplies the credentials."""
    site.make_volume()
    site.append_config(LOCKABLE)
    site.encrypt("key", site.secret("key", 100))
    supplied = json.dumps(
        {
            "Version": 1,
            "AccessKeyId": "testing",
            "SecretAccessKey": "testing",
            "SessionToken": "testing",
            "Expiration": "2099-01-01T00:00:00Z",
        }
    )
    (site.directory / "supplied").write_text(supplied)
    config = site.directory / "aws-config"
    config.write_text(
        f"[profile role]\ncredential_process = cat {site.directory}/supplied\nregion = us-east-1\n"
    )
    env = {name: text for name, text in site.env.items() if "ACCESS_KEY" not in name}
    path = site.directory / "mnt"
    path.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", ALL_GOOD, "bash"]
        + [str(site.directory), str(site.source), str(path)],
        env={**env, "AWS_CONFIG_FILE": str(config), "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "100", done.stderr
    assert lines[1] == f"{path}: good"
    assert done.stdout.count("  good     ") == PROMISES


def test_sigusr1_locks(volume: MountedVolume) -> None:
    os.kill(volume.launcher_pid, signal.SIGUSR1)
    wait_until(
        lambda: strerror_of_cat(volume.path / "key") == "Required key not available",
        "it is locked",
    )
    wait_until(lambda: volume.status()["cached"] == [], "it is wiped")
    assert volume.status()["locked"] is True


def test_lock_says_how_many_it_wiped_and_names_who_cannot_read_any_more(
    volume: MountedVolume,
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(1, flush=True); input()"]
        + [str(volume.path / "key")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        done = volume.kmsfs("lock", volume.path)
    finally:
        holder.communicate(b"\n")
    assert done.output == "locked: 1 plaintext wiped\n"
    assert f"(pid {holder.pid}) cannot read any more: with {volume.path}/key open" in done.stderr


def test_a_promise_that_is_asked_for_in_the_foreground_is_refused_there(site: Site) -> None:
    site.make_volume()
    path = site.directory / "mnt"
    path.mkdir()
    done = subprocess.run(
        [*KMSFS, "mount", site.source, path, "--strict", "--foreground"],
        env=dict(site.env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 6
    assert "--strict asks for it" in done.stderr


# Without the capabilities that know no limit, and with room for the reply buffer and little more.
LITTLE_LOCKED_MEMORY = (
    "setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-ipc_lock,-sys_resource",
    "prlimit", "--memlock=1200000:1200000",
)  # fmt: skip


@pytest.mark.parametrize("allowed", [False, True])
def test_memory_that_cannot_be_locked_is_refused_unless_it_is_allowed(
    site: Site, allowed: bool
) -> None:
    site.make_volume()
    if allowed:
        site.append_config("[cache]\nallow_unlocked = true\n")
    content = site.secret("large", 300_000)
    site.encrypt("large", content)
    volume = MountedVolume(site.source, site.directory / "mnt", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    run_kmsfs(["mount", site.source, volume.path], env=site.env, prefix=LITTLE_LOCKED_MEMORY)
    if not allowed:
        assert strerror_of_cat(volume.path / "large") == "Cannot allocate memory"
        (failing,) = volume.status()["failing"]
        assert failing["reason"].startswith("LockedMemoryExhausted: 300000 bytes do not fit")
        assert "LimitMEMLOCK" in failing["hint"]
        return
    assert (volume.path / "large").read_bytes() == content
    assert volume.status()["plaintext_in"] == ["unlocked"]
    assert any("not locked and may be swapped" in text for text in volume.status()["weaknesses"])
    memory = of(findings(volume), "memory that is locked")
    assert (memory["grade"], "unlocked" in memory["evidence"]) == ("broken", True)
