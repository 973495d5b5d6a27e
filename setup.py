"""Says where setuptools builds; all metadata is in pyproject.toml."""

from tempfile import TemporaryDirectory

from setuptools import setup

# Its own place is build/lib, which it never empties: after an update `pip install .` would install removed files, too.
with TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
