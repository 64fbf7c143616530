"""The administrator's side: volumes, encrypting, decrypting, inspecting. May use AWS."""
