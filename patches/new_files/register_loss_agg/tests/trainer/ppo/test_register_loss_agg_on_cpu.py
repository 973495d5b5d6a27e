# Copyright 2025 Individual Contributor: the authors of vlnorm-verl
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`register_loss_agg`: the registry, verl's own modes in it, and a mode that needs a sum over the mini-batch."""

import socket
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.loss_agg import LOSS_AGG_REGISTRY, get_loss_agg, register_loss_agg, sum_length_stat
from verl.workers.config import ActorConfig
from verl.workers.engine import base
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import length_stat_batch_info

LENGTHS = [2, 3, 30, 5, 0, 7, 13, 1]
WIDTH = 32
STOCK_MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.fixture
def root_mean():
    """A mode with weights sqrt(L_i) / sum_j sqrt(L_j)."""

    @register_loss_agg("root-mean", length_stat=torch.sqrt)
    def agg_root_mean(loss_mat, loss_mask, *, dp_size, batch_stat_sum, **_):
        weights = loss_mask.sum(-1).to(loss_mat.dtype).sqrt() / batch_stat_sum
        return (weights * (loss_mat * loss_mask).sum(-1)).sum() * dp_size

    yield "root-mean"
    del LOSS_AGG_REGISTRY["root-mean"]


def loss_and_mask(dtype=torch.float32):
    loss_mat = torch.randn(len(LENGTHS), WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return loss_mat, torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


def root_mean_loss(loss_mat, mask):
    roots = torch.tensor(LENGTHS, dtype=loss_mat.dtype).sqrt()
    return (roots / roots.sum() * (loss_mat * mask).sum(-1)).sum()


def actor_config(mode):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, loss_agg_mode=mode)


def test_stock_modes_are_registered():
    assert set(LOSS_AGG_REGISTRY) == set(STOCK_MODES)
    assert all(loss_agg.length_stat is None for loss_agg in LOSS_AGG_REGISTRY.values())
    for mode in STOCK_MODES:
        assert actor_config(mode).loss_agg_mode == mode


def test_stock_modes_have_the_documented_values():
    loss_mat, mask = loss_and_mask(torch.float64)
    sums, lengths = (loss_mat * mask).sum(-1), torch.tensor(LENGTHS, dtype=torch.float64)
    valid = (lengths > 0).sum()
    expected = {
        "token-mean": sums.sum() / lengths.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.sum() / valid,
        "seq-mean-token-mean": (sums / lengths.clamp(min=1)).sum() / valid,
        "seq-mean-token-sum-norm": sums.sum() / valid / WIDTH,
    }
    for mode in STOCK_MODES:
        torch.testing.assert_close(agg_loss(loss_mat, mask, mode), expected[mode], rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_stock_modes_need_the_global_batch_on_several_ranks(mode):
    with pytest.raises(ValueError, match="is required when dp_size > 1"):
        agg_loss(*loss_and_mask(), mode, dp_size=2)


def test_unknown_mode_is_refused():
    for call in (get_loss_agg, actor_config, partial(agg_loss, *loss_and_mask())):
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: nothing.*'token-mean'"):
            call("nothing")


def test_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="already been registered"):
        register_loss_agg("token-mean")(lambda loss_mat, loss_mask, **_: loss_mat.sum())


def test_registered_mode_is_accepted_and_used(root_mean):
    assert actor_config(root_mean).loss_agg_mode == root_mean
    loss_mat, mask = loss_and_mask(torch.float64)
    whole = root_mean_loss(loss_mat, mask)
    torch.testing.assert_close(agg_loss(loss_mat, mask, root_mean), whole, rtol=1e-14, atol=0)
    for micro_batch, dp_size in ((loss_mat, 2), (loss_mat.clone().requires_grad_(), 1)):
        with pytest.raises(ValueError, match="batch_stat_sum is required"):
            agg_loss(micro_batch, mask, root_mean, dp_size=dp_size)


def test_stat_of_nested_and_padded_masks_is_the_same():
    _, mask = loss_and_mask()
    nested = torch.nested.as_nested_tensor([row[: max(n, 1)] for row, n in zip(mask, LENGTHS, strict=True)])
    nested = torch.nested.as_nested_tensor(list(nested.unbind()), layout=torch.jagged)
    expected = torch.tensor([n for n in LENGTHS if n], dtype=torch.float64).reciprocal().sum()
    for response_mask in (mask, nested):
        torch.testing.assert_close(sum_length_stat(response_mask, torch.reciprocal), expected, rtol=1e-15, atol=0)


def test_missing_sum_is_an_error_and_other_modes_get_nothing(root_mean):
    data = TensorDict({"response_mask": torch.ones(2, 3)}, batch_size=[2])
    with pytest.raises(ValueError, match="needs batch_stat_sum"):
        length_stat_batch_info(root_mean, data)
    assert all(length_stat_batch_info(mode, data) == {} for mode in [*STOCK_MODES, "of-a-plugin"])


class SummingEngine(base.BaseEngine):
    """BaseEngine without a model: the sum of its micro-batches' losses."""

    def get_data_parallel_size(self):
        return torch.distributed.get_world_size()

    def get_data_parallel_group(self):
        return torch.distributed.group.WORLD

    def is_mp_src_rank_with_outputs(self):
        return False

    def optimizer_zero_grad(self):
        pass

    def optimizer_step(self):
        pass

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        tu.assign_non_tensor(data, dp_size=self.get_data_parallel_size())
        return sum(loss_function(data=micro_batch) for micro_batch in prepare_micro_batches(data)[0])


def plain_loss(config, data):
    info = length_stat_batch_info(config.loss_agg_mode, data)
    return agg_loss(data["loss_mat"], data["response_mask"], config.loss_agg_mode, data["dp_size"], **info)


def train_on_rank(rank, world_size, port, mode):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    base.get_device_id = lambda: "cpu"
    try:
        loss_mat, mask = loss_and_mask(torch.float64)
        whole = root_mean_loss(loss_mat, mask)
        rows = torch.arange(len(LENGTHS)).chunk(world_size)[rank]
        data = TensorDict({"loss_mat": loss_mat[rows], "response_mask": mask[rows]}, batch_size=[len(rows)])
        tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
        loss = SummingEngine().train_batch(data, partial(plain_loss, config=actor_config(mode)))
        torch.distributed.all_reduce(loss)
        torch.testing.assert_close(loss / world_size, whole, rtol=1e-14, atol=0)

        keys = set(data.keys()) - {"batch_stat_sum"}
        fresh = data.select(*keys)
        SummingEngine().train_batch(fresh, partial(plain_loss, config=actor_config("token-sum")))
        assert set(fresh.keys()) == keys
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_engine_sums_the_statistic_over_micro_batches_and_ranks(root_mean, world_size):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = (world_size, port, root_mean)
    torch.multiprocessing.start_processes(train_on_rank, args, nprocs=world_size, start_method="fork")
