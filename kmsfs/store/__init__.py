"""What is served: the source tree, who may open it, and the plaintext held for it."""
