"""Which policy losses and features of verl keep the exact sum: verl's real FSDP2 engine, row by row.

    python -m tests.engine.features --ranks 2 --dtype float64 [--device cuda] --out FILE

writes FILE as JSON, one entry a row. `kind` says what became of it, `expected` what must with this release of verl
(docs/support.md says the same in words):

    exact     the row was trained; `error` is the relative distance of the whole gradient from Σ x_i g_i
    refused   the row must not be trained; `at_config` is the driver's message, `at_run` the mini-batch's for a config
              that was never checked ("" if it is trained then); `refusal`: what both say
    absent    this release of verl lacks the loss or the feature
    failed    an exception, in `message`

The reference is generic. g_i is the gradient that the same engine gives with verl's own mode seq-mean-token-sum for
a mini-batch of nothing but response i (every data-parallel rank holds it, so that its mean over the ranks is g_i),
one response a micro-batch. x_i are numpy's, from the lengths. It holds for every policy loss that is a sum over a
response's own tokens, and for clip_cov and kl_cov, which choose tokens within a micro-batch, at micro-batch 1.
For the packed rows (remove padding, Ulysses) g_i comes from reference.response_gradients, without any engine.

`wrong` is how far, on the same scale, the nearest mistake would be: equal weights, and for rows with masks the lengths
of a mask that still has the tokens, or padding rows counted. With 4 ranks only Ulysses runs, 2 data-parallel ranks ×
2 sequence-parallel ranks.

Flash attention needs CUDA and knows no float64. In the packed rows a causal attention over packed sequences in torch
stands where verl calls it, between its own all-to-alls; nothing else of verl's path is replaced. Not exercised: other
engines than FSDP2, images, a trl value head.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from tests.engine import older_verl, ranks, reference, verl_side
from tests.engine.feature_cases import Case, cases, register_user_losses
from tests.engine.feature_workers import make_worker
from tests.engine.reference import VOCAB, M, Rows, Scenario, relative_error, weighted_sum
from vlnorm_verl.cpu import patches
from vlnorm_verl.plugin import policy_loss as policy_losses
from vlnorm_verl.plugin.modes import is_ours

# Half of the scenarios' responses, since every row needs the gradient of each one by itself.
ROWS = 8
LENGTHS = reference.LENGTHS[:ROWS]
MODE = "vl_norm:0.75"  # scenarios.py has more
REFERENCE_MODE = "seq-mean-token-sum"
REMOVED = (1, 4)  # responses that rejection takes out as a whole
PADDING = 3  # synthetic rows of the upsampled batch


def response_masks(kind: str) -> list[torch.Tensor]:
    """Valid tokens of each response, int64 [L] each."""
    masks = [torch.ones(length, dtype=torch.int64) for length in LENGTHS]
    if kind == "tools":  # two tokens of the model, three of a tool, and so on
        masks = [mask * (torch.arange(len(mask)) % 5 < 2) for mask in masks]
    if kind.startswith("rejected"):  # the first token stays, so that some response keeps only that one
        g = torch.Generator().manual_seed(11)
        keep = [torch.rand(len(mask), generator=g) < 0.5 for mask in masks]
        masks = [mask * kept.index_fill(0, torch.tensor([0]), True) for mask, kept in zip(masks, keep, strict=True)]
    if kind == "rejected":
        for i in REMOVED:
            masks[i] = torch.zeros_like(masks[i])
    return masks


@dataclass
class Extra:
    """Columns beside those of reference.Rows: float [L] of each response, if nothing else is said."""

    teachers: list[torch.Tensor]  # [L + PROMPT, VOCAB], log-probabilities
    is_weights: list[torch.Tensor]
    values: list[torch.Tensor]
    returns: list[torch.Tensor]


def make_extra(rows: Rows, dtype: torch.dtype) -> Extra:
    """Also makes the advantages of `rows` differ from token to token, as those of a critic do."""
    g = torch.Generator().manual_seed(5)

    def noise(size: float) -> list[torch.Tensor]:
        return [size * torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for n in LENGTHS]

    rows.advantages = [a + n for a, n in zip(rows.advantages[:ROWS], noise(0.5), strict=True)] + rows.advantages[ROWS:]
    is_weights, values, returns = [n.exp() for n in noise(0.5)], noise(1.0), noise(1.0)
    teachers = [torch.randn(len(ids), VOCAB, generator=g, dtype=torch.float64).log_softmax(-1) for ids in rows.ids]
    return Extra([teacher.to(dtype) for teacher in teachers], is_weights, values, returns)


def column(like: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """A column of responses in the layout of `like`: jagged, or padded on the right [B, T]."""
    if like.is_nested:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    return torch.stack([torch.nn.functional.pad(part, (0, like.shape[-1] - len(part))) for part in parts])


def make_data(case: Case, scenario: Scenario, rows: Rows, extra: Extra, mine: Sequence[int]) -> TensorDict:
    """This rank's responses `mine`, with the case's masks and columns."""
    data = verl_side.make_data(rows, scenario, mine)
    like = data["response_mask"]
    masks = response_masks(case.masks)
    data["response_mask"] = column(like, [masks[i] for i in mine])
    if not case.masks.startswith("rejected"):
        # Tool tokens are in neither mask; rollout correction takes tokens out of response_mask alone.
        data["loss_mask"] = data["response_mask"]
    if case.is_weights:
        data["rollout_is_weights"] = column(like, [extra.is_weights[i] for i in mine])
    if case.distillation:
        add_teacher(data, case, rows, extra, mine)
    if case.worker == "critic":
        data["values"] = column(like, [extra.values[i] for i in mine])
        data["returns"] = column(like, [extra.returns[i] for i in mine])
    return data


def add_teacher(data: TensorDict, case: Case, rows: Rows, extra: Extra, mine: Sequence[int]) -> None:
    """What the teacher says of each token of prompt and response: its likeliest ones, or of the token that follows."""
    from verl.utils import tensordict_utils as tu

    topk = case.distillation["loss_mode"] == "forward_kl_topk"
    if topk:
        chosen = [extra.teachers[i].topk(case.distillation["topk"]).indices for i in mine]
    else:
        chosen = [rows.ids[i].roll(-1)[:, None] for i in mine]
    log_probs = [extra.teachers[i].gather(-1, ids) for i, ids in zip(mine, chosen, strict=True)]
    data["teacher_ids"] = torch.nested.as_nested_tensor(chosen, layout=torch.jagged)
    data["teacher_logprobs"] = torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)
    tu.assign_non_tensor(data, distillation_use_topk=topk)


def with_padding_rows(data: TensorDict, count: int) -> TensorDict:
    """`data` and `count` of verl's own synthetic rows behind it (trainer/ppo/padding_utils.py:89)."""
    from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
    from verl.utils import tensordict_utils as tu

    nested = [key for key, value in data.items() if isinstance(value, torch.Tensor) and value.is_nested]
    sample, _ = construct_minimal_padding_template({key: data[key][0] for key in nested}, {}, eos_token_id=1)
    # The other columns are made later in a step, from the row's one response token.
    for key in ("old_log_probs", "ref_log_prob", "advantages"):
        sample[key] = torch.full((1,), -0.7, dtype=data[key].dtype)
    tensors: dict[str, Any] = {
        key: torch.nested.as_nested_tensor([*data[key].unbind(), *[sample[key]] * count], layout=torch.jagged)
        for key in nested
    }
    others = {key: tu.get(data, key) for key in data.keys() if key not in nested and key != "row_id"}  # noqa: SIM118
    return tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=others)


def loss_function(case: Case, mode: str, *, checked: bool = True) -> Callable[..., Any]:
    """verl's loss with its config, as verl's workers make it; `checked`: as the driver does before a run."""
    from verl.workers.config import CriticConfig, PolicyLossConfig
    from verl.workers.utils import losses

    if case.worker == "critic":
        return functools.partial(
            losses.value_loss,
            config=CriticConfig(
                strategy="fsdp2",
                ppo_micro_batch_size_per_gpu=1,
                cliprange_value=0.5,
                loss_agg_mode=mode,
                **({"loss_scale_factor": M} if "loss_scale_factor" in critic_settings() else {}),
                # Else verl 0.7.1 loads a model for the config.
                **({"model_config": ""} if "model_config" in critic_settings() else {}),
            ),
        )
    scenario = Scenario("", mode, entropy_coeff=case.entropy_coeff, kl_coef=case.kl_coef)
    options = dict(case.options)
    if case.correction:
        from verl.trainer.config import RolloutCorrectionConfig

        options["rollout_correction"] = RolloutCorrectionConfig(bypass_mode=True, **case.correction)
    policy_loss = PolicyLossConfig(loss_mode=case.loss, **options)
    config = verl_side.actor_config(scenario)
    if case.clip is not None:
        config = dataclasses.replace(config, clip_ratio_low=case.clip, clip_ratio_high=case.clip)
    if checked:
        config = dataclasses.replace(config, policy_loss=policy_loss, global_batch_info={})
        if is_ours(mode):
            policy_losses.check(config)
    else:
        object.__setattr__(config, "policy_loss", policy_loss)
    if case.distillation:
        from verl.trainer.distillation.losses import distillation_ppo_loss
        from verl.workers.config import DistillationConfig, DistillationLossConfig

        distillation = DistillationConfig(distillation_loss=DistillationLossConfig(**case.distillation))
        return functools.partial(distillation_ppo_loss, config=config, distillation_config=distillation)
    return functools.partial(losses.ppo_loss, config=config)


# ------------------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def without_chance() -> Iterator[None]:
    """clip_cov draws its tokens by torch.randperm (trainer/ppo/core_algos.py:1823): always the same ones."""
    randperm = torch.randperm
    torch.randperm = lambda n, **_: torch.arange(n).flip(0)
    try:
        yield
    finally:
        torch.randperm = randperm


class Bench:
    """What one rank needs for every row: its workers, the batch, the gradients g_i found so far."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.model, self.rows, actor, _ = verl_side.start_rank(rank, args)
        self.extra = make_extra(self.rows, getattr(torch, args.dtype))
        self.workers = {"actor": actor}
        self.gradients: dict[str, torch.Tensor] = {}

    def worker(self, kind: str) -> Any:
        if kind not in self.workers:
            self.workers[kind] = make_worker(kind, self.workers["actor"])
        return self.workers[kind]

    def train(self, case: Case, loss: Callable[..., Any], data: TensorDict) -> list[tuple[torch.Tensor, int]]:
        worker = self.worker(case.worker)
        worker.set_loss_fn(loss)
        with verl_side.recording(worker.engine, "all_to_all") as steps, without_chance():
            worker.train_mini_batch(data)
        return [(gradient, all_to_alls) for gradient, _, all_to_alls in steps]

    def scenario(self, case: Case, **settings: Any) -> Scenario:
        values: dict[str, Any] = {"micro": case.micro, "tokens": case.tokens, "mini": ROWS} | settings
        if not older_verl.takes_nested_data():
            values |= {"padded": True, "width": 60}  # as in scenarios.scenarios
        return Scenario(case.name, entropy_coeff=case.entropy_coeff, kl_coef=case.kl_coef, **values)

    def response_gradients(self, case: Case, lengths: np.ndarray) -> torch.Tensor:
        """g_i [ROWS, parameters] of responses with a valid token; 0 for the others."""
        # How the batch is split makes no difference to them.
        key = repr(dataclasses.replace(case, name="", micro=None, tokens=None))
        if key not in self.gradients:
            self.gradients[key] = self.find_response_gradients(case, lengths)
        return self.gradients[key]

    def find_response_gradients(self, case: Case, lengths: np.ndarray) -> torch.Tensor:
        live = np.flatnonzero(lengths).tolist()
        if case.worker in ("packed", "ulysses") and case.masks == "full" and not case.distillation:
            return reference.response_gradients(self.model, self.rows, self.scenario(case))[:ROWS]
        size = self.worker(case.worker).engine.get_data_parallel_size()
        scenario = self.scenario(case, micro=1, tokens=None, mini=size)
        data = make_data(case, scenario, self.rows, self.extra, live)
        steps = [gradient for gradient, _ in self.train(case, loss_function(case, REFERENCE_MODE), data)]
        gradients = torch.zeros(ROWS, len(steps[0]), dtype=steps[0].dtype)
        gradients[live] = torch.stack(steps)
        return gradients

    def mine(self, case: Case) -> range:
        """This rank's responses; sequence-parallel ranks have the same."""
        engine = self.worker(case.worker).engine
        share = ROWS // engine.get_data_parallel_size()
        first = engine.get_data_parallel_rank() * share
        return range(first, first + share)

    def batch(self, case: Case) -> TensorDict:
        """This rank's part of the mini-batch; synthetic rows take the places of the last PADDING responses."""
        scenario = self.scenario(case)
        mine = self.mine(case)
        if case.masks != "padding rows":
            return make_data(case, scenario, self.rows, self.extra, mine)
        real = [i for i in mine if i < ROWS - PADDING]
        data = make_data(case, scenario, self.rows, self.extra, real)
        return with_padding_rows(data, len(mine) - len(real))


def critic_settings() -> set[str]:
    """Names of the critic's settings, which differ from release to release; M is there since verl 0.9.0."""
    from verl.workers.config import CriticConfig

    return {f.name for f in dataclasses.fields(CriticConfig)}


def mode_of(case: Case) -> str:
    """The mode that a row is trained with; without an M, a method that needs none."""
    return "dapo_norm" if case.worker == "critic" and "loss_scale_factor" not in critic_settings() else MODE


def missing(case: Case) -> str:
    """What this release of verl lacks for a row; "" if nothing."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    if case.loss not in POLICY_LOSS_REGISTRY:
        return f"policy loss {case.loss}"
    if case.distillation and importlib.util.find_spec("verl.trainer.distillation") is None:
        return "distillation"
    if case.masks == "padding rows" and importlib.util.find_spec("verl.trainer.ppo.padding_utils") is None:
        return "synthetic padding rows (trainer/ppo/padding_utils.py)"
    return ""


def exact_row(bench: Bench, case: Case) -> dict[str, Any]:
    """The gradient against Σ x_i g_i."""
    lengths = np.array([int(mask.sum()) for mask in response_masks(case.masks)])
    # What the lengths would be by a mask that still has the tokens; a padding row has one response token.
    mistaken = np.array(LENGTHS)
    if case.masks == "padding rows":
        lengths[-PADDING:] = 0
        mistaken[-PADDING:] = 1
    mode, g = mode_of(case), bench.response_gradients(case, lengths)
    ((gradient, all_to_alls),) = bench.train(case, loss_function(case, mode), bench.batch(case))
    expected = weighted_sum(mode, lengths, g)
    mistakes = [g[lengths > 0].mean(0) / M]
    if (lengths != mistaken).any():
        mistakes.append(weighted_sum(mode, mistaken, g))
    return {
        "kind": "exact",
        "mode": mode,
        "data_parallel": bench.worker(case.worker).engine.get_data_parallel_size(),
        "all_to_alls": all_to_alls,
        "norm": expected.norm().item(),
        "error": relative_error(gradient, expected),
        "rounding": case.rounding,
        "wrong": min(relative_error(mistake, expected) for mistake in mistakes),
    }


def refused_row(bench: Bench, case: Case, at_config: str) -> dict[str, Any]:
    """Also what happens if a config that the driver refuses reaches the engine."""
    try:
        bench.train(case, loss_function(case, MODE, checked=False), bench.batch(case))
        at_run = ""
    except (ValueError, RuntimeError) as error:
        at_run = str(error)
    return {"kind": "refused", "at_config": at_config, "at_run": at_run}


def run_row(bench: Bench, case: Case) -> dict[str, Any]:
    row = {"row": case.name, "expected": case.expected(), "refusal": case.refusal}
    if lacks := missing(case):
        return row | {"kind": "absent", "message": f"this verl has no {lacks}"}
    try:
        loss_function(case, mode_of(case))
    except ValueError as error:
        return row | refused_row(bench, case, str(error))
    try:
        return row | exact_row(bench, case)
    except NotImplementedError as error:  # top-k distillation with fsdp2 up to verl 0.9.0
        return row | {"kind": "absent", "message": str(error)}
    except Exception as error:  # every rank raises it alike; the other rows still have their say
        return row | {"kind": "failed", "message": f"{type(error).__name__}: {error}"[:2000]}


def run(rank: int, args: argparse.Namespace) -> None:
    bench = Bench(rank, args)
    if older_verl.needed() or args.device == "cuda":  # its critic wants flash attention, which knows no float64
        patches.critic_attention(importlib.import_module("verl.utils.model"))
    register_user_losses()
    chosen = [case for case in cases(args.ranks) if any(part in case.name for part in args.only)]
    ranks.finish(rank, args, [run_row(bench, case) for case in chosen])


def main() -> None:
    args = ranks.make_parser(__doc__).parse_args()
    if args.dtype == "bfloat16":
        raise SystemExit("--dtype bfloat16: its rounding is larger than what is looked for here; see scenarios.py")
    if args.device == "cpu":
        ranks.prepare(args)
    ranks.start(run, args)


if __name__ == "__main__":
    main()
