"""Settings of every test: hypothesis without a deadline (two busy cores make any deadline flaky)."""

from hypothesis import settings

settings.register_profile("vlnorm", deadline=None)
settings.load_profile("vlnorm")
