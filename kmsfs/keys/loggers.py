"""Keeps the AWS libraries' loggers from every handler: their records may hold plaintext."""

import logging
from typing import Final

# At DEBUG botocore, boto3 and urllib3 show response bodies; the Encryption SDK shows plaintext
# at DEBUG and logs a traceback at each failure.
_LOGGERS: Final = ("aws_encryption_sdk", "boto3", "botocore", "urllib3")


def silence() -> None:
    """Let no record of these libraries reach a handler of this process; nothing undoes it."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]
