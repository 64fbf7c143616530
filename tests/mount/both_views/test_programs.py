"""Services that know nothing of kmsfs start from files on a mount."""

import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.support.mounts import MountedVolume, wait_gone, wait_until
from tests.support.sites import Site

_NGINX_CONF = """
daemon off;
pid {work}/nginx.pid;
error_log {work}/error.log info;
user www-data;
events {{}}
http {{
  access_log off;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi; uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{
    listen unix:{work}/tls.sock ssl;
    ssl_certificate {cert};
    ssl_certificate_key {key};
    location / {{ return 200 "served"; }}
  }}
}}
"""


@pytest.fixture
def key_pair(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key, as files."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture
def mounted_key(site: Site, key_pair: tuple[Path, Path], public_directory: Path) -> MountedVolume:
    """A volume that serves the key as `nginx/ssl.pem`, where other users can get to it."""
    site.make_volume()
    site.encrypt("nginx/ssl.pem", key_pair[1].read_bytes())
    return site.mount(path=public_directory / "mnt")


def test_nginx_completes_a_tls_handshake_with_its_key_on_the_mount(
    mounted_key: MountedVolume, key_pair: tuple[Path, Path], public_directory: Path
) -> None:
    config = public_directory / "nginx.conf"
    config.write_text(
        _NGINX_CONF.format(
            work=public_directory, cert=key_pair[0], key=mounted_key.path / "nginx/ssl.pem"
        )
    )
    nginx = subprocess.Popen(
        ["/usr/sbin/nginx", "-c", config, "-p", public_directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        address = public_directory / "tls.sock"
        wait_until(lambda: address.exists() or nginx.poll() is not None, "nginx listens")
        assert nginx.poll() is None, nginx.stdout.read() if nginx.stdout else b""
        context = ssl.create_default_context(cafile=str(key_pair[0]))
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(address))
            with context.wrap_socket(raw, server_hostname="localhost") as tls:
                tls.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b""
                while part := tls.recv(4096):
                    answer += part
        assert answer.endswith(b"served")
        # The key was read as root; the worker, which faces the network, cannot read it.
        worker_uid = pwd.getpwnam("www-data").pw_uid
        workers = Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split()
        assert any(os.stat(f"/proc/{pid}").st_uid == worker_uid for pid in workers)
        refused = subprocess.run(
            ["cat", mounted_key.path / "nginx/ssl.pem"],
            user="www-data",
            group="www-data",
            extra_groups=[],
            capture_output=True,
            env={"LC_ALL": "C"},
            check=False,
        )
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert b"Permission denied" in refused.stderr
    finally:
        nginx.send_signal(signal.SIGTERM)
        nginx.communicate(timeout=20)
        wait_gone(nginx.pid)


def test_openssl_uses_a_key_on_the_mount(mounted_key: MountedVolume) -> None:
    done = subprocess.run(
        ["openssl", "pkey", "-in", mounted_key.path / "nginx/ssl.pem", "-noout", "-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Key is valid" in done.stdout


@pytest.mark.skipif(shutil.which("keytool") is None, reason="no Java on this machine")
def test_java_reads_a_key_store_on_the_mount(
    site: Site, key_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store.p12"
    subprocess.run(
        ["openssl", "pkcs12", "-export", "-in", key_pair[0], "-inkey", key_pair[1]]
        + ["-name", "web", "-passout", "pass:changeit", "-out", store],
        check=True,
        capture_output=True,
    )
    site.make_volume()
    site.encrypt("store.p12", store.read_bytes())
    volume = site.mount()
    done = subprocess.run(
        ["keytool", "-list", "-keystore", volume.path / "store.p12", "-storepass", "changeit"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "web" in done.stdout
