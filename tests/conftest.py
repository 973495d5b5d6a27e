"""Settings of every test: hypothesis without a deadline (two busy cores make any deadline flaky), and the order."""

import os

import pytest
from hypothesis import settings

from vlnorm_verl import machine

# With the first three typer and rich colour what they write into pipes, too, which cuts the words that tests look for
# in pieces. With VERL_PLATFORM, which docs/your-own-run.md has a shell set, no run is on GPUs; with RAY_ADDRESS none is
# on this machine's own Ray.
for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "VERL_PLATFORM", "RAY_ADDRESS"):
    os.environ.pop(name, None)
# Else a run on GPUs would go over to this checkout's .venv-gpu: `vlnorm-verl` would take the place of pytest.
machine.ENVIRONMENTS = ()
settings.register_profile("vlnorm", deadline=None)
settings.load_profile("vlnorm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The training run first, which no worker is to be left alone with: recipes/test.sh keeps this order."""
    items.sort(key=lambda item: item.path.name != "test_e2e.py")
