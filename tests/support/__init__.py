"""What tests share: key services, faults, the canary, real processes and mounts."""
