"""The maths: `vlnorm_verl.aggregation` against the closed forms of tests/engine/reference.py.

Covered: weights, splits into parts, permutations, padding, masked rows, dtypes, sizes, the registry and its messages.
Not covered: anything of verl (test_engine.py has the real engine).
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine import reference
from vlnorm_verl import Aggregation, available, parse_mode, register_aggregation, registry
from vlnorm_verl.aggregation import aggregate, mini_batch_sum, response_lengths, response_weights, weight_dtype
from vlnorm_verl.metrics import MiniBatchSums, mini_batch_statistics, mini_batch_sums, relative_weight_range

M = 64.0
MODES = ["vl_norm", "vl_norm:0.75", "vl_norm:0", "vl_norm:2", "grpo_norm", "dapo_norm", "dr_grpo_norm"]
lengths_strategy = st.lists(st.integers(0, 60), min_size=1, max_size=24).filter(any)


def closed_form(mode: str, lengths: list[int] | np.ndarray) -> np.ndarray:
    return reference.weights(mode, np.array(lengths), M)


def ragged(lengths: list[int], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses and mask [B, T]; NaN where masked, which must not matter."""
    width = width or max(max(lengths), 1)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    losses = torch.randn(len(lengths), width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return losses.masked_fill(~mask, math.nan), mask


def sums_of(method: Aggregation, lengths: torch.Tensor) -> MiniBatchSums:
    return MiniBatchSums(*mini_batch_sums(method, lengths).tolist())


@given(lengths=lengths_strategy, mode=st.sampled_from(MODES) | st.floats(0, 2).map("vl_norm:{}".format))
def test_weights_are_the_closed_form(lengths: list[int], mode: str) -> None:
    method, length = parse_mode(mode), torch.tensor(lengths)
    weights = response_weights(method, length, mini_batch_sum(method, length), M)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights.numpy(), closed_form(mode, lengths), rtol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@given(lengths=lengths_strategy, data=st.data())
def test_any_split_order_and_padding_gives_the_same_loss(mode: str, lengths: list[int], data: st.DataObject) -> None:
    """Micro-batches of any sizes, in any order, each padded to a width of its own."""
    method = parse_mode(mode)
    losses, _ = ragged(lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)), max_size=5)) | {len(lengths)})
    parts = [order[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]

    # Sums of parts add, as they do over data-parallel ranks.
    total = sum(mini_batch_sum(method, torch.tensor([lengths[i] for i in part])) for part in parts)
    loss = 0.0
    for part in parts:
        part_lengths = [lengths[i] for i in part]
        width = max(*part_lengths, 1) + data.draw(st.integers(0, 3))
        mat = torch.full((len(part), width), math.nan, dtype=torch.float64)
        for row, i in enumerate(part):
            mat[row, : lengths[i]] = losses[i, : lengths[i]]
        mask = torch.arange(width)[None] < torch.tensor(part_lengths)[:, None]
        loss += aggregate(mat, mask, method, total, M).item()
    expected = (closed_form(mode, lengths) * losses.nansum(-1).numpy()).sum()
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_the_loss_is_the_weight(mode: str) -> None:
    lengths = [0, 1, 5, 17]
    losses, mask = ragged(lengths)
    losses.requires_grad_()
    method = parse_mode(mode)
    aggregate(losses, mask, method, mini_batch_sum(method, torch.tensor(lengths)), M).backward()
    expected = torch.from_numpy(closed_form(mode, lengths))[:, None] * mask
    torch.testing.assert_close(losses.grad, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_mini_batch_without_a_valid_token_gives_zero_and_zero_gradient(mode: str) -> None:
    losses, mask = ragged([0, 0], width=4)
    losses.requires_grad_()
    method = parse_mode(mode)
    lengths = torch.tensor([0, 0])
    loss = aggregate(losses, mask, method, mini_batch_sum(method, lengths), M)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(losses.grad, torch.zeros_like(losses))


def test_a_sum_of_nan_is_seen_in_every_weight() -> None:
    """A method of a user's, with a bad length in another micro-batch: weights without their sum would look right."""
    method = Aggregation(numerator=torch.ones_like, summand=lambda n: (n - 3.0).log(), divide_by_m=False)
    total = mini_batch_sum(method, torch.tensor([2, 9]))
    assert response_weights(method, torch.tensor([9]), total, None).isnan().all()


def test_bf16_losses_are_weighted_in_float64_and_summed_in_float32() -> None:
    """4,097 tokens of 1/256: a bf16 sum stops growing at 2.0, far from 16.004."""
    losses, mask = torch.full((1, 4097), 1 / 256, dtype=torch.bfloat16), torch.ones(1, 4097, dtype=torch.bool)
    method = parse_mode("dr_grpo_norm")
    loss = aggregate(losses, mask, method, torch.tensor(1.0, dtype=torch.float64), 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4097 / 256, rel=1e-6)


@pytest.mark.parametrize(("device", "bits"), [("cpu", 64), ("cuda", 64), ("npu", 32), ("mps", 32)])
def test_devices_sum_in_float64_where_they_have_it(device: str, bits: int) -> None:
    assert torch.finfo(weight_dtype(device)).bits == bits


@pytest.mark.parametrize("mode", MODES)
def test_device_without_float64(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlnorm_verl.aggregation.weight_dtype", lambda device_type: torch.float32)
    lengths = [0, 1, 7, 500, 131_072]
    method, length = parse_mode(mode), torch.tensor(lengths)
    weights = response_weights(method, length, mini_batch_sum(method, length), M)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), closed_form(mode, lengths), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_largest_lengths_and_batches(mode: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 131_073, size=65_536)
    lengths[:2] = 1, 131_072
    method, length = parse_mode(mode), torch.from_numpy(lengths)
    weights = response_weights(method, length, mini_batch_sum(method, length), M)
    np.testing.assert_allclose(weights.numpy(), closed_form(mode, lengths.tolist()), rtol=1e-11)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_lengths_of_nested_and_padded_masks_agree(lengths: list[int]) -> None:
    """A jagged row holds the whole response; tokens masked inside (a tool's, say) do not count."""
    rows = [torch.tensor([1] * n + [0] * (i % 3 + 1)) for i, n in enumerate(lengths)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert response_lengths(nested).tolist() == response_lengths(padded).tolist() == lengths


@given(lengths=lengths_strategy, alpha=st.sampled_from([0.0, 0.75, 1.0, 2.0]))
def test_statistics_are_those_of_the_definitions(lengths: list[int], alpha: float) -> None:
    method, length = parse_mode(f"vl_norm:{alpha}"), torch.tensor(lengths)
    sums = sums_of(method, length)
    statistics = mini_batch_statistics(method, sums, M)
    valid = np.array([n for n in lengths if n], dtype=float)
    x = closed_form(f"vl_norm:{alpha}", valid)
    assert statistics["length_mean"] == pytest.approx(valid.mean())
    assert statistics["length_harmonic_mean"] == pytest.approx(len(valid) / (1 / valid).sum())
    assert statistics["variance_ratio"] == pytest.approx(math.sqrt(valid.mean() * (1 / valid).mean()))
    assert statistics["effective_responses"] == pytest.approx(1 / ((M * x) ** 2).sum())
    assert statistics["weighted_tokens"] / statistics["divisor"] == pytest.approx((x * valid).sum())
    assert sums.summand == mini_batch_sum(method, length).item()
    assert relative_weight_range(method, torch.zeros_like(length), sums) == (math.inf, 0.0)  # another rank's part
    low, high = relative_weight_range(method, length, sums)
    assert low == pytest.approx((M * len(valid) * x).min())
    assert high == pytest.approx((M * len(valid) * x).max())


@pytest.mark.parametrize("mode", MODES)
def test_entropies_of_a_rollout_batch_are_nats_a_token_by_the_metrics_of_its_mini_batches(mode: str) -> None:
    """0.25 nats at every token; mini-batches whose lengths differ by orders of magnitude."""
    method, mini_batches = parse_mode(mode), [torch.tensor([3, 10]), torch.tensor([0, 2000])]
    statistics = [mini_batch_statistics(method, sums_of(method, part), M) for part in mini_batches]
    divisor, weighted = (np.mean([row[key] for row in statistics]) for key in ("divisor", "weighted_tokens"))
    logged = (closed_form(mode, [3, 10, 2000]) * 0.25 * np.array([3, 10, 2000])).sum()  # actor/entropy
    assert logged * divisor / weighted == pytest.approx(0.25)


def test_weights_that_are_all_0_have_statistics() -> None:
    """A method of a user's that leaves short responses out, and a mini-batch of short ones."""
    method = Aggregation(numerator=lambda n: (n > 9).double(), summand=torch.ones_like, divide_by_m=False)
    lengths = torch.tensor([2, 9])
    sums = sums_of(method, lengths)
    assert mini_batch_statistics(method, sums, None)["effective_responses"] == 0
    assert relative_weight_range(method, lengths, sums) == (0, 0)


def test_a_narrowed_jagged_mask_has_the_lengths_of_what_is_left() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(3), torch.tensor([1.0, 0, 1, 1])], layout=torch.jagged)
    padded = torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 1]])
    narrowed = torch.nested.narrow(padded, 1, torch.tensor([0, 1]), torch.tensor([2, 2]), layout=torch.jagged)
    assert response_lengths(jagged).tolist() == [3, 3]
    assert response_lengths(narrowed).tolist() == [2, 1]


@pytest.mark.parametrize("scale", [None, 0, -1, math.inf, math.nan])
def test_bad_scale_is_refused(scale: float | None) -> None:
    method = parse_mode("vl_norm")
    with pytest.raises(ValueError, match="loss_scale_factor"):
        response_weights(method, torch.tensor([1]), torch.tensor(1.0), scale)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("vl-norm", "Did you mean 'vl_norm'"),
        ("VLNorm", "Did you mean 'vl_norm'"),
        ("tokenmean", "Did you mean 'token-mean'"),
        ("xyz", "Accepted: .*vl_norm.*token-mean"),
        ("vl_norm:2.5", "accepted: 0 ≤ α ≤ 2"),
        ("vl_norm:-0.1", "accepted: 0 ≤ α ≤ 2"),
        ("vl_norm:nan", "accepted: 0 ≤ α ≤ 2"),
        ("vl_norm:", "is not a number"),
        ("vl_norm:one", "is not a number"),
        ("dapo_norm:1", "takes no parameter"),
    ],
)
def test_bad_modes_are_refused_with_one_helpful_message(mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_mode(mode, "actor.loss_agg_mode", also_accepted=["token-mean"])
    assert f"actor.loss_agg_mode={mode!r}" in str(caught.value)


def test_own_aggregation_is_registered_once_and_never_hides_one_of_verls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_aggregation("test_sqrt")
    def test_sqrt() -> Aggregation:
        return Aggregation(numerator=lambda n: n**-0.5, summand=lambda n: n**-0.5, divide_by_m=True)

    assert "test_sqrt" in available()
    assert torch.equal(parse_mode("test_sqrt").numerator(torch.tensor([4.0])), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="registered already"):
        register_aggregation("vl_norm")(test_sqrt)
    with pytest.raises(ValueError, match="lower-case"):
        register_aggregation("token-mean")


# ------------------------------------------------------------------------------------------ the authors' own scheme
# Paper's repository, GRPO advantage on the driver: A_i is multiplied by (L_i/L̄)^-α / mean_j (L_j/L̄)^-α over the whole
# rollout batch, and the loss is the mean over (responses × padded width), so that M is the padded width.


def clipped_loss(ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """PPO's clipped, dual-clipped token loss (clip 0.2/0.3, c 3)."""
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * 3.0), loss)


def authors_factor(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    relative = (lengths / lengths.double().mean()) ** -alpha
    return relative / relative.mean()


def log_normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Lengths like those of a reasoning model, cut at 512."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws * 0.8 + 4.5).exp().long().clamp(1, 512)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_equals_the_authors_scheme_for_one_update_per_rollout_batch(alpha: float) -> None:
    """Loss and gradient; scaling the advantage before the clip is exact because the loss is homogeneous in it."""
    g = torch.Generator().manual_seed(0)
    lengths = log_normal((64,), seed=1)
    ratio = (0.5 * torch.randn(64, 512, generator=g, dtype=torch.float64)).exp()
    advantage = torch.randn(64, 1, generator=g, dtype=torch.float64)
    mask = torch.arange(512) < lengths[:, None]
    theirs_ratio, ours_ratio = ratio.clone().requires_grad_(), ratio.clone().requires_grad_()
    scaled = advantage * authors_factor(lengths, alpha)[:, None]
    theirs = (clipped_loss(theirs_ratio, scaled) * mask).mean()
    theirs.backward()
    method = parse_mode(f"vl_norm:{alpha}")
    total = mini_batch_sum(method, lengths)
    ours = aggregate(clipped_loss(ours_ratio, advantage), mask, method, total, scale=512)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(ours_ratio.grad, theirs_ratio.grad, rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize(("alpha", "percent"), [(0.75, 3.5), (1.0, 5)])
def test_with_four_updates_the_authors_sum_of_weights_moves_by_a_few_percent(alpha: float, percent: float) -> None:
    """Σx_i of one update times M, over 400 rollout batches of 4 × 320 responses (docs/recipes.md). Ours is always 1."""
    theirs = torch.stack([authors_factor(batch, alpha).mean(-1) for batch in log_normal((400, 4, 320))])
    assert 100 * theirs.std(-1).mean().item() == pytest.approx(percent, rel=0.1)


# --------------------------------------------------------------------------------------------------------- memory


class LargeTensors(TorchDispatchMode):
    """Collects the types of the tensors of at least `entries` entries that operators return."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.entries:
                self.dtypes.add(tensor.dtype)
        return result


def peak_bytes(call: Any) -> int:
    """Most memory that torch held at once during `call`, above what it held before; inside of operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_of_batch_by_length_is_wider_than_float32(dtype: torch.dtype) -> None:
    """Forward and backward, with the bool mask that verl's losses pass."""
    losses = torch.randn(64, 512, dtype=dtype, requires_grad=True)
    lengths = torch.randint(1, 513, (64,))
    mask = torch.arange(512) < lengths[:, None]
    method = parse_mode("vl_norm:0.75")
    total = mini_batch_sum(method, lengths)
    seen = LargeTensors(losses.numel())
    with seen:
        aggregate(losses, mask, method, total, 512.0).backward()
    assert dtype in seen.dtypes
    assert seen.dtypes <= {dtype, torch.bool, torch.float32}
    # One copy of the losses, or one of the mask, at 4 bytes an entry; the half byte is for all that is [B].
    losses32 = losses.detach().float()
    assert peak_bytes(lambda: aggregate(losses32, mask, method, total, 512.0)) < 4.5 * losses.numel()
