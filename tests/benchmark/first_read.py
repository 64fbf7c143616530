"""How much later than a Decrypt by boto3 itself the first read of a file comes."""

import gc
from pathlib import Path

from tests.benchmark.bench import (
    Kms,
    Result,
    median_ms,
    read_whole,
    running_kms,
    site_of,
    timed,
    wait_without_workers,
)

_WARM_FILES = 100
_IDLE_ROUNDS = 7


def measure(directory: Path) -> list[Result]:
    """First reads with a warm worker, and after idle, beside direct calls in the same run."""
    with running_kms() as kms:
        return [_warm(kms, directory / "warm"), _idle(kms, directory / "idle")]


def _warm(kms: Kms, directory: Path) -> Result:
    with site_of(kms, directory) as site:
        blobs = [site.blob(site.secret(f"file {n}", 1000)) for n in range(_WARM_FILES)]
        for number, blob in enumerate(blobs):
            site.write(f"file-{number}.encrypted", blob)
        volume = site.mount()
        client = kms.client()
        for number in range(5):
            client.decrypt(CiphertextBlob=blobs[number], KeyId=site.key_arn)
            read_whole(volume.path / f"file-{number}")
        direct, mounted = [], []
        gc.disable()
        for number in range(5, _WARM_FILES):
            blob, path = blobs[number], volume.path / f"file-{number}"
            direct.append(
                timed(lambda blob=blob: client.decrypt(CiphertextBlob=blob, KeyId=site.key_arn))
            )
            mounted.append(timed(lambda path=path: read_whole(path)))
        gc.enable()
    above = median_ms(mounted) - median_ms(direct)
    detail = f"boto3 {median_ms(direct):.2f} ms, first read {median_ms(mounted):.2f} ms"
    return Result("first read, warm worker, above boto3", above, 3.0, " ms", detail)


def _idle(kms: Kms, directory: Path) -> Result:
    with site_of(kms, directory) as site:
        blobs = [site.blob(site.secret(f"file {n}", 1000)) for n in range(_IDLE_ROUNDS)]
        for number, blob in enumerate(blobs):
            site.write(f"file-{number}.encrypted", blob)
        volume = site.mount()
        client = kms.client()
        direct, mounted = [], []
        for number, blob in enumerate(blobs):
            wait_without_workers(volume)
            direct.append(
                timed(lambda blob=blob: client.decrypt(CiphertextBlob=blob, KeyId=site.key_arn))
            )
            path = volume.path / f"file-{number}"
            mounted.append(timed(lambda path=path: read_whole(path)))
    # The first round also waits for the zygote's imports.
    above = median_ms(mounted[1:]) - median_ms(direct[1:])
    detail = f"boto3 {median_ms(direct[1:]):.2f} ms, first read {median_ms(mounted[1:]):.2f} ms"
    return Result("first read, after idle, above boto3", above, 40.0, " ms", detail)
