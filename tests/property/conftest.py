"""Settings of hypothesis: time is no property here, on machines that share their cores."""

from hypothesis import settings

settings.register_profile("kmsfs", deadline=None)
settings.register_profile("long", deadline=None, max_examples=20_000)
settings.load_profile("kmsfs")
