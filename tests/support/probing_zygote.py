"""The real zygote and workers, but for the decryption: instead a worker tries forbidden things.

Run as `python -m tests.support.probing_zygote SOCKET_FD SETTINGS_FD [unconfined]`. The ciphertext
of a request is JSON, `{"directory": ..., "port": ..., "names": [...]}`, and so is the plaintext:
what became of each attempt of `tests.support.forbidden`. With `unconfined` workers confine
themselves to nothing: the control.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kmsfs.decryptor import worker, zygote
from kmsfs.decryptor.decrypt import Allocate, DecryptedInfo
from kmsfs.memory import sandbox
from kmsfs.memory.sandbox import SandboxReport
from tests.support.forbidden import Attempts


def probe(ciphertext: bytes, _rules: Any, _keys: Any, allocate: Allocate) -> DecryptedInfo:
    """Try what the request asks for, in place of decrypting."""
    wanted = json.loads(ciphertext)
    attempts = Attempts(Path(wanted["directory"]), wanted["port"])
    content = json.dumps(attempts.outcomes(*wanted["names"])).encode()
    allocate(len(content))[:] = content
    return DecryptedInfo(len(content), "arn:none", "probe")


def confine_nothing(_connect_ports: Collection[int]) -> SandboxReport:
    """Stand-in for `sandbox.confine_worker`."""
    return SandboxReport(landlock_abi=0, seccomp=False, gaps=("everything",))


if __name__ == "__main__":
    worker.decrypt_ciphertext = probe  # type: ignore[attr-defined]
    if sys.argv[3:] == ["unconfined"]:
        sandbox.confine_worker = confine_nothing
    zygote.main(sys.argv[1:3])
