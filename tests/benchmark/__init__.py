"""Benchmarks: kmsfs beside its peers, in one run. `python -m tests.benchmark` prints them.

Each line is a ratio or a difference of medians with its bound. No test fails on a time.
"""
