"""What an administrator sees of a running mount and says to it."""
