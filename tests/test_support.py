"""The support matrix: docs/support.md is made from it, its evidence exists, and what it says of policy losses is so."""

import ast
import functools
from pathlib import Path

import pytest

from vlnorm_verl import plugin, support

REPOSITORY = Path(__file__).parent.parent
CELLS = [
    pytest.param(cell, id=f"{row.name}, {release}")
    for rows in support.matrix().tables.values()
    for row in rows
    for release, cell in row.cells.items()
]


def test_document_is_up_to_date() -> None:
    made = support.markdown() + "\n"
    assert (REPOSITORY / "docs" / "support.md").read_text() == made, "python -m vlnorm_verl.support > docs/support.md"


def test_releases_are_those_that_the_plugin_knows() -> None:
    assert support.matrix().releases == plugin.TESTED_RELEASES


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_has_its_evidence(cell: support.Cell) -> None:
    assert cell.status in support.STATUS
    if cell.status == "absent":
        return
    assert cell.by
    if cell.status == "read":
        assert cell.note, "the reason why it was not run"
        return
    file, _, name = cell.by.partition("::")
    assert functions_of(file), cell.by
    assert not name or name in functions_of(file), cell.by


def test_policy_losses_of_the_installed_release_are_as_the_matrix_says() -> None:
    import verl
    from verl.trainer.ppo import core_algos
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    said = {
        name: cell.status
        for name, cell in support.matrix().by_name(verl.__version__).items()
        if name in core_algos.POLICY_LOSS_REGISTRY
    }
    actor = FSDPActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode="vl_norm",
        policy_loss=PolicyLossConfig(dro_beta=1.0, rollout_correction={"loss_type": "reinforce"}),
    )
    stock = {name for name, loss in core_algos.POLICY_LOSS_REGISTRY.items() if loss.__module__ == core_algos.__name__}
    assert set(said) == stock
    accepted = {name for name in stock if not plugin.policy_loss_problem(name, actor)}
    assert accepted == {name for name, status in said.items() if status == "exact"}
    assert {name for name, status in said.items() if status == "refused"} == stock - accepted
