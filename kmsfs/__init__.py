"""kmsfs: files encrypted under AWS KMS, served as ordinary files."""
