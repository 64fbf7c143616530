"""The ciphertext formats kmsfs reads and writes. Detection and parsing never need KMS."""
