"""Locked memory for plaintext, and what a process does to keep its memory to itself."""
