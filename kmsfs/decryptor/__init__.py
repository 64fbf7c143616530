"""Decryption in short-lived worker processes, and the daemon's end of the conversation."""
