"""Says where setuptools builds; all metadata is in pyproject.toml."""

from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import setup

if not Path("vlnorm_verl/recipes").is_dir():
    raise SystemExit("vlnorm_verl/recipes is no folder: pip reads no links in a ZIP. Take the .tar.gz, or git+https")

# Its own place is build/lib, which it never empties: after an update `pip install .` would install removed files, too.
with TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
