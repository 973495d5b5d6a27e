"""The support matrix: what vl_norm is known to do with which release, engine, trainer, policy loss and feature of verl.

support.yaml holds it; `python -m vlnorm_verl.support` prints it as Markdown (docs/support.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

STATUS = {
    "exact": "exact",
    "partly": "partly run",
    "runs": "runs",
    "read": "read only",
    "raises": "raises",
    "refused": "refused",
    "absent": "–",
}


@dataclass(frozen=True)
class Cell:
    """One statement. by: a test (file or file::name) or, for `read`, where in verl; note: conditions and reasons."""

    status: str
    by: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """An engine, trainer, policy loss or feature, by its name in verl's configuration where it has one."""

    name: str
    cells: dict[str, Cell]  # by release
    package: str = ""  # that must be installed for it


@dataclass(frozen=True)
class Matrix:
    releases: tuple[str, ...]
    tables: dict[str, tuple[Row, ...]]

    def column(self, release: str) -> dict[str, dict[str, Cell]]:
        """{table: {row: cell}} of one release."""
        return {name: {row.name: row.cells[release] for row in rows} for name, rows in self.tables.items()}

    def by_name(self, release: str) -> dict[str, Cell]:
        """{name: cell} of one release; a row that is several counts for each. Empty if the release is not in here."""
        if release not in self.releases:
            return {}
        rows = [item for table in self.column(release).values() for item in table.items()]
        return {name: cell for row, cell in rows for name in row.split(", ")}


@functools.cache
def matrix() -> Matrix:
    content = yaml.safe_load((resources.files("vlnorm_verl") / "support.yaml").read_text(encoding="utf-8"))
    releases = tuple(content["releases"])
    tables = {table["name"]: tuple(_row(row, releases) for row in table["rows"]) for table in content["tables"]}
    return Matrix(releases, tables)


def _row(content: dict[str, Any], releases: tuple[str, ...]) -> Row:
    cells = {release: Cell(*content.get(release, content["all"])) for release in releases}
    return Row(content["name"], cells, content.get("package", ""))


def markdown() -> str:
    """All tables; a note, and the test or file behind a cell, stand below the table."""
    lines = [
        "# What vl_norm is known to do, and how",
        "",
        "Made by `python -m vlnorm_verl.support > docs/support.md` from `vlnorm_verl/support.yaml`.",
        "",
        "The tables are one matrix: engine, trainer, policy loss and feature meet in one place only,",
        "`BaseEngine.train_batch`, which every trainer calls for one optimizer mini-batch and no engine overrides, and",
        "in `agg_loss`, which every policy loss calls on a micro-batch. A combination is as good as its weakest cell.",
        "",
        "- **exact**: the gradient is Σ x_i g_i on real verl, up to rounding (1e-12 in float64).",
        "- **partly run**: the engine's own loss path, on a CPU, stand-ins for what needs CUDA (`docs/engines.md`).",
        "- **runs**: trained for some steps on the CPU stack; the lengths in its metrics are those of the responses.",
        "- **read only**: not run, for the reason given.",
        "- **raises**: not seen at configuration time; the first loss raises.",
        "- **refused**: by one message at configuration time, since it cannot be exact; by the first mini-batch where",
        "  only the engine knows (what Megatron-Bridge's provider of a model sets, the size of its group).",
        "- **–**: that release has no such thing.",
        "",
        "The column `by` names tests of this repository and files of verl's, in the releases that the cell is for.",
        "",
        "`bash recipes/test.sh` runs the column of the newest release, its trainers with `slow` behind it;",
        "`bash recipes/test_releases.sh` runs engines, policy losses and features of every release, in an environment",
        "made from that release's wheel, and compares with this page ([releases.md](releases.md) is its last table).",
    ]
    for name, rows in matrix().tables.items():
        lines += ["", f"## {name}", "", "| | " + " | ".join(f"verl {r}" for r in matrix().releases) + " | by |"]
        lines.append("|---" * (len(matrix().releases) + 2) + "|")
        notes: list[str] = []
        for row in rows:
            texts = []
            for cell in row.cells.values():
                mark = ""
                if cell.note:
                    if cell.note not in notes:
                        notes.append(cell.note)
                    mark = f" ({notes.index(cell.note) + 1})"
                texts.append(f"{STATUS[cell.status]}{mark}")
            evidence = dict.fromkeys(f"`{cell.by}`" for cell in row.cells.values() if cell.by)
            lines.append(f"| {row.name} | {' | '.join(texts)} | {', '.join(evidence)} |")
        if notes:
            lines.append("")
            lines += [f"{i}. {' '.join(note.split())}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
