"""What tests share.

Fixtures (tests/conftest.py):

    strict_kms, kms_key    strict stand-in for KMS, in this process; a fresh key in it
    fault_proxy            a proxy in front of it, faults switchable
    moto_kms, moto_key     moto's server in a process of its own (session); a fresh key in it
    aws_files              this process's AWS configuration, empty at first
    mountable              skips or fails where the machine cannot mount

Helpers:

    canary.secret(label, size_bytes)         a test's plaintext; where it shows, the test fails
    commands.run_kmsfs(arguments, env=...)   the command line as a process, its output watched
    requirements.require_mount()             what `mountable` calls
    strict_kms.StrictKms                     `python -m tests.support.strict_kms` for benchmarks
    fault_proxy.FaultProxy, Fault            what networks do
    leftovers.keep(pid)                      a process that outlives its test on purpose

Every test runs under `watch`: see there and at `canary` what it looks at. A test whose standard
output is plaintext on purpose is marked `@pytest.mark.plaintext_on("stdout")`.
"""
