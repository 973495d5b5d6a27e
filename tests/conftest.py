"""Settings of every test: hypothesis without a deadline (two busy cores make any deadline flaky), and the order."""

import os

import pytest
from hypothesis import settings

# With it typer colours what it writes into pipes, too, which cuts the words that tests look for in pieces.
os.environ.pop("GITHUB_ACTIONS", None)
settings.register_profile("vlnorm", deadline=None)
settings.load_profile("vlnorm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The training run first, which no worker is to be left alone with: recipes/test.sh keeps this order."""
    items.sort(key=lambda item: item.path.name != "test_e2e.py")
