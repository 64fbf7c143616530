"""A decryption under way, which any number of opens may wait for."""

from dataclasses import dataclass, field

import trio

from kmsfs.errors import KmsfsError
from kmsfs.store.lease import Entry
from kmsfs.store.source import SourceFile


@dataclass(eq=False, slots=True)
class Flight:
    """One decryption.

    Attributes:
        waiting: how many opens wait for it.
        outdated: whether KMS is to be asked anew by whoever comes from now on; what it brings
            is for those alone who wait for it already.
    """

    file: SourceFile
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    waiting: int = 0
    outdated: bool = False
    entry: Entry | None = None
    error: KmsfsError | None = None
