"""Key services: the protocol every caller sees, and AWS KMS behind it."""
