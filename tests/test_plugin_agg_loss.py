"""verl's `agg_loss` with the plugin: never a silent local sum, metrics of the whole batch, verl's modes bit for bit.

Gradients of our modes in verl's engine: test_engine.py.
"""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import warm
from vlnorm_verl import parse_mode
from vlnorm_verl.methods import OF_VERL
from vlnorm_verl.metrics import MiniBatchSums, mini_batch_sums
from vlnorm_verl.plugin import hooks, modes
from vlnorm_verl.plugin.mini_batch import MiniBatch, working_on


def test_no_silent_local_sum() -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    losses, mask = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="whole mini-batch"):
        agg_loss(losses, mask, "vl_norm", loss_scale_factor=2)
    with pytest.raises(RuntimeError, match="whole mini-batch"):  # a share of a batch that other ranks have too
        agg_loss(losses.detach(), mask, "vl_norm", dp_size=2, loss_scale_factor=2)
    with pytest.raises(ValueError, match="loss_scale_factor=0"):
        agg_loss(losses.detach(), mask, "vl_norm", loss_scale_factor=0)


@pytest.mark.parametrize("mode", ["vl_norm", "dr_grpo_norm"])
def test_a_config_that_verls_validation_did_not_see_is_named(mode: str) -> None:
    """Of a main program of one's own. Only validation fills M and refuses what cannot be exact."""
    config = SimpleNamespace(loss_agg_mode=mode, loss_scale_factor=None)
    train_batch = hooks.with_mini_batch(lambda *_: pytest.fail("trains"))
    with pytest.raises(ValueError, match=rf"{mode}.* loss_scale_factor is null here.* validate_config"):
        train_batch(None, {}, functools.partial(print, config=config))


def test_a_mini_batch_leaves_nothing_behind() -> None:
    """Also under the name that verl's trainers have it by, which is for whole batches outside of a mini-batch."""
    from verl.trainer.ppo.ray_trainer import agg_loss

    losses, mask = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
    with working_on(MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(0.5), dp_size=1, scale=2.0)):
        agg_loss(losses, mask, "vl_norm")
    with pytest.raises(RuntimeError, match="whole mini-batch"):
        agg_loss(losses, mask, "vl_norm", loss_scale_factor=2)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_alpha_0_is_verls_dr_grpo_and_the_entropy_metric_takes_the_whole_batch(lengths: list[int], seed: int) -> None:
    """The driver's call, with verl's own arguments (trainer/ppo/v1/trainer_base.py:1677)."""
    from verl.trainer.ppo.ray_trainer import agg_loss

    loss = torch.rand(len(lengths), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
    ours = agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode="vl_norm:0", loss_scale_factor=9)
    stock = agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=9)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-12)


@pytest.mark.parametrize("mode", [*OF_VERL, "seq-mean-token-sum"])
def test_stock_modes_get_every_argument_as_it_was_given(mode: str) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    losses, mask = torch.rand(3, 4), torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    for positional, named in (((), {}), ((2, 9, 5), {}), ((2, 9), {"global_batch_size": 5, "loss_scale_factor": 8})):
        assert torch.equal(
            agg_loss(losses, mask, mode, *positional, **named),
            modes.stock_agg_loss(losses, mask, mode, *positional, **named),
        )
    assert not torch.equal(agg_loss(losses, mask, mode, 2, 9, 5), agg_loss(losses, mask, mode))


def test_stock_modes_compile_to_one_graph_as_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # cpu_environment sets it; nothing would be compiled
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    losses, mask = torch.rand(2, 3), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    compiled = torch.compile(lambda x: agg_loss(x, mask, "token-mean", dp_size=1), fullgraph=True, backend=backend)
    assert torch.equal(compiled(losses), agg_loss(losses, mask, "token-mean"))
    assert len(graphs) == 1


def test_stock_modes_are_bit_identical_with_and_without_the_plugin() -> None:
    """Whole gradients of the real engine on two ranks, and metrics, with the package's entry point on and off."""
    options = ("--ranks", "2", "--dtype", "float32", "--stock")
    results = [warm.results("scenarios", *options, VERL_USE_EXTERNAL_PLUGINS=switch) for switch in ("auto", "none")]
    assert [row["plugin"] for row in results[0]] == [True] * len(results[0])
    assert [row["plugin"] for row in results[1]] == [False] * len(results[1])
    for with_plugin, without in zip(*results, strict=True):
        for key in ("mode", "scenario", "gradient_sha256", "metrics"):
            assert with_plugin[key] == without[key], (with_plugin["mode"], key)
    assert len({row["gradient_sha256"] for row in results[0]}) == len(results[0])  # the modes differ


def test_verls_trainers_reduce_each_metric_as_it_is_meant() -> None:
    """Over the mini-batches of a step: they choose mean, min or max by parts of a metric's name."""
    from verl.experimental.fully_async_policy.detach_utils import MetricsAggregator as FullyAsync
    from verl.trainer.ppo.v1.utils import MetricsAggregator as SeparateAsync
    from verl.utils.metric import reduce_metrics

    method, lengths = parse_mode("vl_norm"), torch.tensor([1, 2])
    ours = hooks.metrics(method, lengths, MiniBatchSums(*mini_batch_sums(method, lengths).tolist()), scale=4.0)
    meant = {name: {"mean": 2.0, "min": 1.0, "max": 3.0}[metric.aggregation.value] for name, metric in ours.items()}
    assert reduce_metrics({name: [1.0, 3.0] for name in ours}) == meant
    for aggregator in (SeparateAsync(), FullyAsync(total_gpus=1)):
        for value in (1.0, 3.0):
            aggregator.add_step_metrics(dict.fromkeys(ours, value), sample_count=1)
        reduced = aggregator.get_aggregated_metrics()
        assert {name: reduced[name] for name in ours} == meant
