"""Lets verl and vLLM find the entry points of a checkout that is not installed: writes SITE/vlnorm_verl-….dist-info.

python benchmarks/gpu/metadata.py SITE     a folder on PYTHONPATH
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "vlnorm_verl/__init__.py").read_text(), re.MULTILINE)
    info = site / f"vlnorm_verl-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vlnorm-verl\nVersion: {version}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("".join(groups))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
