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
"""`loss_agg_mode=vl_norm`: weights, invariance to the split of a mini-batch, the engine's sum, configuration.

The engine here is BaseEngine with a linear model: train_batch, prepare_micro_batches and ppo_loss are the real ones.
"""

import socket
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.loss_agg import parse_vl_norm, response_lengths
from verl.workers.config import ActorConfig, CriticConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine import base
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import ppo_loss, value_loss

M = 48
PROMPT = 3
WIDTH = 30
LENGTHS = [2, 3, 30, 5, 21, 7, 13, 1]
REJECTED = 4  # this response's tokens are taken out of response_mask, as by rollout correction, not out of loss_mask
MODES = ["vl_norm", "vl_norm:0.75", "vl_norm:0", "vl_norm:2"]
STOCK_MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def expected_weights(mode, lengths):
    alpha = float(mode.partition(":")[2] or 1)
    powers = [n**-alpha if n else 0.0 for n in lengths]
    return torch.tensor([p / sum(powers) / M for p in powers], dtype=torch.float64)


def power_sum(mode, lengths):
    return sum(n ** -parse_vl_norm(mode) for n in lengths if n)


def loss_and_mask(lengths, seed=0):
    loss_mat = torch.randn(len(lengths), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return loss_mat, torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_the_closed_form(mode):
    loss_mat, mask = loss_and_mask(LENGTHS)
    loss_mat.requires_grad_()
    agg_loss(loss_mat, mask, mode, loss_scale_factor=M, batch_weight_sum=power_sum(mode, LENGTHS)).backward()
    torch.testing.assert_close(loss_mat.grad, expected_weights(mode, LENGTHS)[:, None] * mask, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_any_split_gives_the_same_loss(mode, dp_size, micro_batch_size):
    loss_mat, mask = loss_and_mask(LENGTHS)
    ranks = []
    for rows in torch.arange(len(LENGTHS)).chunk(dp_size):
        info = dict(dp_size=dp_size, loss_scale_factor=M, batch_weight_sum=power_sum(mode, LENGTHS))
        ranks.append(sum(agg_loss(loss_mat[i], mask[i], mode, **info) for i in rows.split(micro_batch_size)))
    # Data parallelism averages gradients over the ranks.
    whole = agg_loss(loss_mat, mask, mode, loss_scale_factor=M)
    torch.testing.assert_close(sum(ranks) / dp_size, whole, rtol=1e-13, atol=0)


def test_alpha_0_is_seq_mean_token_sum_norm():
    loss_mat, mask = loss_and_mask(LENGTHS)
    stock = agg_loss(loss_mat, mask, "seq-mean-token-sum-norm", loss_scale_factor=M)
    torch.testing.assert_close(agg_loss(loss_mat, mask, "vl_norm:0", loss_scale_factor=M), stock, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_masked_responses_and_entries_do_not_matter(mode):
    loss_mat, mask = loss_and_mask(LENGTHS)
    more_mat, more_mask = loss_and_mask([*LENGTHS, 0, 0], seed=1)
    more_mat[: len(LENGTHS)] = torch.where(mask, loss_mat, torch.nan)
    more_mat[len(LENGTHS) :] = torch.nan
    whole = agg_loss(loss_mat, mask, mode, loss_scale_factor=M)
    torch.testing.assert_close(agg_loss(more_mat, more_mask, mode, loss_scale_factor=M), whole, rtol=1e-14, atol=0)


def test_batch_without_valid_token_gives_0():
    loss_mat, mask = loss_and_mask([0, 0])
    assert agg_loss(loss_mat, mask, "vl_norm", loss_scale_factor=M) == 0
    assert agg_loss(loss_mat, mask, "vl_norm", dp_size=2, loss_scale_factor=M, batch_weight_sum=0.0) == 0


def test_missing_numbers_are_errors():
    loss_mat, mask = loss_and_mask(LENGTHS)
    with pytest.raises(ValueError, match="batch_weight_sum is required"):
        agg_loss(loss_mat, mask, "vl_norm", dp_size=2, loss_scale_factor=M)
    with pytest.raises(ValueError, match="batch_weight_sum is required for a gradient"):
        agg_loss(loss_mat.requires_grad_(), mask, "vl_norm", loss_scale_factor=M)
    with pytest.raises(ValueError, match="loss_scale_factor is required"):
        agg_loss(loss_mat, mask, "vl_norm")


def test_low_precision_losses_keep_float32_sums():
    loss_mat, mask = loss_and_mask(LENGTHS)
    loss = agg_loss(loss_mat.bfloat16(), mask, "vl_norm", loss_scale_factor=M)
    assert loss.dtype == torch.float32
    exact = agg_loss(loss_mat.bfloat16().double(), mask, "vl_norm", loss_scale_factor=M)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_lengths_of_nested_masks():
    rows = [torch.tensor(row) for row in ([1, 1, 0, 1], [0, 0], [1])]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    assert response_lengths(nested).tolist() == [3, 0, 1]


# ------------------------------------------------------------------------------------------------ engine and losses


class LinearEngine(base.BaseEngine):
    """Log-probabilities (or values) are features @ weight."""

    def __init__(self):
        self.weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def get_data_parallel_size(self):
        return torch.distributed.get_world_size()

    def get_data_parallel_group(self):
        return torch.distributed.group.WORLD

    def is_mp_src_rank_with_outputs(self):
        return False

    def optimizer_zero_grad(self):
        self.weight.grad = None

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        tu.assign_non_tensor(
            data, dp_size=self.get_data_parallel_size(), batch_num_tokens=data["loss_mask"].sum().item()
        )
        for micro_batch in prepare_micro_batches(data, dp_group=self.get_data_parallel_group())[0]:
            rows = [PROMPT + n for n in micro_batch["length"].tolist()]
            outputs = [features[:n] @ self.weight for features, n in zip(micro_batch["features"], rows, strict=True)]
            outputs = torch.nested.nested_tensor_from_jagged(torch.cat(outputs), lengths_to_offsets(rows))
            loss_function(model_output={"log_probs": outputs, "values": outputs}, data=micro_batch)[0].backward()

    def optimizer_step(self):
        torch.distributed.all_reduce(self.weight.grad)
        self.weight.grad /= self.get_data_parallel_size()


def lengths_to_offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def make_data(rows):
    """Rows of the batch in the padded layout: prompts of PROMPT tokens, then up to WIDTH tokens of the response."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), WIDTH)
    lengths = torch.tensor(LENGTHS)
    valid = (torch.arange(WIDTH) < lengths[:, None]).long()
    kept = valid * (torch.arange(len(LENGTHS)) != REJECTED)[:, None]
    ids = torch.ones(len(LENGTHS), PROMPT + WIDTH, dtype=torch.long)
    tensors = {
        "input_ids": ids,
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "attention_mask": torch.cat([ids[:, :PROMPT], valid], dim=1),
        "loss_mask": valid,
        "response_mask": kept,
        "length": lengths,
        "features": torch.randn(len(LENGTHS), PROMPT + WIDTH, 4, dtype=torch.float64, generator=generator),
        "advantages": torch.randn(shape, dtype=torch.float64, generator=generator),
        "old_log_probs": torch.zeros(shape, dtype=torch.float64),
        "values": torch.zeros(shape, dtype=torch.float64),
        "returns": torch.randn(shape, dtype=torch.float64, generator=generator),
    }
    data = TensorDict({key: value[rows] for key, value in tensors.items()}, batch_size=[len(rows)])
    settings = dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=2, global_batch_size=len(LENGTHS))
    return tu.assign_non_tensor(data, **settings)


def expected_gradient(mode, token_gradient):
    """Sum of x_i g_i. Response token t has the output of the token before it."""
    data = make_data(range(len(LENGTHS)))
    features = data["features"][:, PROMPT - 1 : -1]
    token_gradients = token_gradient(data) * data["response_mask"]
    responses = torch.einsum("it,itk->ik", token_gradients, features)
    return expected_weights(mode, data["response_mask"].sum(-1).tolist()) @ responses


def policy_token_gradient(data):
    return -data["advantages"]  # of the clipped objective at ratio 1


def value_token_gradient(data):
    return -data["returns"]  # of half the squared error at value 0


def actor_config(mode, scale=M, **kwargs):
    settings = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, loss_scale_factor=scale)
    return ActorConfig(loss_agg_mode=mode, **settings, **kwargs)


def critic_config(mode, scale=M):
    config = dict(strategy="fsdp", ppo_micro_batch_size_per_gpu=2, loss_agg_mode=mode, loss_scale_factor=scale)
    if "model_config" in CriticConfig.__dataclass_fields__:  # else __post_init__ would make one from a path
        config["model_config"] = HFModelConfig.__new__(HFModelConfig)
    return CriticConfig(**config)


def train_on_rank(rank, world_size, port, mode):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    base.get_device_id = lambda: "cpu"
    try:
        engine, rows = LinearEngine(), torch.arange(len(LENGTHS)).chunk(world_size)[rank].tolist()
        engine.train_batch(make_data(rows), partial(ppo_loss, config=actor_config(mode)))
        expected = expected_gradient(mode, policy_token_gradient)
        torch.testing.assert_close(engine.weight.grad, expected, rtol=1e-12, atol=1e-14)
        engine.train_batch(make_data(rows), partial(value_loss, config=critic_config(mode)))
        expected = expected_gradient(mode, value_token_gradient)
        torch.testing.assert_close(engine.weight.grad, expected, rtol=1e-12, atol=1e-14)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_engine_gradient_is_the_closed_form(world_size, mode):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = (world_size, port, mode)
    torch.multiprocessing.start_processes(train_on_rank, args, nprocs=world_size, start_method="fork")


@pytest.mark.parametrize("loss", [ppo_loss, value_loss])
def test_loss_without_the_engines_sum_is_an_error(loss):
    config = actor_config("vl_norm") if loss is ppo_loss else critic_config("vl_norm")
    data = tu.assign_non_tensor(make_data([0]), dp_size=1, batch_num_tokens=2)
    outputs = torch.nested.as_nested_tensor([torch.zeros(PROMPT + LENGTHS[0])], layout=torch.jagged)
    with pytest.raises(ValueError, match="needs batch_weight_sum"):
        loss(config, {"log_probs": outputs, "values": outputs}, data)


@pytest.mark.parametrize("mode", STOCK_MODES)
def test_other_modes_get_nothing_new(mode):
    config = actor_config(mode)
    data = tu.assign_non_tensor(make_data([0]), dp_size=1, batch_num_tokens=2)
    keys = set(data.keys())
    LinearEngine()._assign_batch_weight_sum(data, partial(ppo_loss, config=config))
    assert set(data.keys()) == keys
    outputs = torch.nested.as_nested_tensor([torch.zeros(PROMPT + LENGTHS[0])], layout=torch.jagged)
    ppo_loss(config, {"log_probs": outputs}, data)
    assert set(config.global_batch_info) == {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"}


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("mode", ["vl_norm:", "vl_norm:x", "vl_norm:-0.1", "vl_norm:2.1", "vl_norm:nan", "vl_norms"])
def test_bad_mode_is_refused(mode):
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: vl_norm"):
        actor_config(mode)


@pytest.mark.parametrize("scale", [None, 0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("make_config", [actor_config, critic_config])
def test_scale_is_required(make_config, scale):
    with pytest.raises(ValueError, match=r"loss_scale_factor > 0.*data\.max_response_length"):
        make_config("vl_norm", scale=scale)
    if scale is None:
        assert make_config("token-mean", scale=None).loss_scale_factor is None


@pytest.mark.parametrize("loss_mode", ["geo_mean", "sapo"])
def test_policy_loss_that_ignores_the_mode_is_refused(loss_mode):
    policy_loss = PolicyLossConfig(loss_mode=loss_mode)
    with pytest.raises(ValueError, match="does not aggregate by loss_agg_mode"):
        actor_config("vl_norm", policy_loss=policy_loss)
    assert actor_config("token-mean", policy_loss=policy_loss).policy_loss.loss_mode == loss_mode


def test_rejection_inside_the_loss_is_refused():
    policy_loss = {"loss_mode": "bypass_mode", "rollout_correction": {"rollout_rs": "token_k1"}}
    with pytest.raises(ValueError, match="rollout_rs removes tokens inside each micro-batch"):
        actor_config("vl_norm", policy_loss=policy_loss)
    policy_loss["rollout_correction"]["rollout_rs"] = None
    actor_config("vl_norm", policy_loss=policy_loss)
