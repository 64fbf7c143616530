"""What the FUSE view asks KMS for: files that are opened, and nothing else."""

import subprocess

from tests.support.sites import Site


def test_metadata_never_calls_kms(site: Site) -> None:
    for index in range(5):
        site.encrypt_with_aws_cli(f"file-{index}.encrypted", site.secret("meta", 50))
    volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    subprocess.run(["ls", "-lR", volume.path], check=True, capture_output=True)
    subprocess.run(["find", volume.path, "-size", "+0"], check=True, capture_output=True)
    subprocess.run(["df", volume.path], check=True, capture_output=True)
    subprocess.run(["stat", volume.path / "file-0"], check=True, capture_output=True)
    status = volume.status()
    assert status["failing"] == []
    assert status["worker_pids"] == []
