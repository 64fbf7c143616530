"""`python -m kmsfs`: the same as `kmsfs`."""

from kmsfs.cli import main

if __name__ == "__main__":
    main()
