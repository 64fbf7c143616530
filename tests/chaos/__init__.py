"""The chaos run: readers, rotations, tampering, kills and outages at random, all at once.

`python -m tests.chaos --seconds 600` runs it by command, `tests/fault/test_chaos.py` briefly.

Held against everything that is read: it is one complete version of that very file, none older
than what was in place when the open began, none newer than what was written when it ended.

    content    plaintexts that say of every byte whose it is
    check      tells a right read from a wrong one
    table      what is in place now, shared by all processes without locks
    errnos     which errors a reader may meet, and when
    reader     a process that reads all the time
    files      the files, their ciphertexts, and where they lie
    mutator    rotates, rewrites, removes, swaps, rolls back
    trouble    kills, outages, lock and unlock
    run        puts all of it together
"""
