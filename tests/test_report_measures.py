"""What the report measures of runs: seeds, differences, monotonicity, entropy; expected numbers by other means."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.report_runs import (
    KEY,
    configure,
    foot,
    looked_at,
    made,
    put,
    random_dump,
    read,
    read_one,
    record,
    report,
    text,
    write_run,
)
from vlnorm_verl.report import groups, measures, verdict
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run

# ---------------------------------------------------------------------------------------------------------------- seeds


def test_one_seed_says_so_and_more_seeds_do_not(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, seed=s, dumps={10: random_dump(s, 0.5)}) for s in range(3)]
    runs = read(*folders)
    assert measures.final_accuracy(runs[:1]).note == "one seed"
    assert measures.final_accuracy(runs).note == ""
    assert [row["seeds"] for row in made(runs, "results")] == [3]


def test_responses_of_a_problem_stay_together(tmp_path: Path) -> None:
    """Eight equal responses of 50 problems are 50 pieces of evidence, not 400."""
    run = read_one(write_run(tmp_path, dumps={10: {f"p{i}": [i % 2] * 8 for i in range(50)}}))
    found = measures.final_accuracy([run])
    assert found.high - found.low == pytest.approx(2 * 2.01 * 0.5 / np.sqrt(49), rel=0.08)


def test_without_dumps_the_interval_is_over_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, seed=s, curve={10: 0.5 + s / 10}) for s in range(3)]
    found = measures.final_accuracy(read(*folders))
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert found.note == "no dumps, over seeds only"


def test_of_two_runs_of_one_seed_the_one_that_is_further_counts(tmp_path: Path) -> None:
    """A run that crashed, and what was left of it where it went on: fewer steps, and the final ones."""
    crashed = write_run(tmp_path / "a", curve={0: 0.1, 20: 0.2, 40: 0.3, 60: 0.4}, planned=100)
    resumed = write_run(tmp_path / "a-resumed", curve={80: 0.5, 100: 0.6}, planned=100)
    for order in ([crashed, resumed], [resumed, crashed]):
        runs = read(*order)
        (row,) = made(runs, "results")
        assert (row["seeds"], row["step"], row["Avg@8"].value) == (1, "100", 0.6)
        left_out = ["left out" in entry["notes"] for entry in made(runs, "inputs")]
        assert left_out == [folder == crashed for folder in order]
        assert "Not finished" not in looked_at(runs)
    (one,) = read(f"vl_norm@0={crashed}", f"vl_norm@0={resumed}")
    assert one.steps.tolist() == [0, 20, 40, 60, 80, 100]


def test_a_seed_that_is_not_as_far_is_not_in_the_final_values(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, dumps={400: random_dump(0, 0.4), 450: random_dump(1, 0.5)}),
        write_run(tmp_path, seed=1, dumps={400: random_dump(2, 0.1)}),
        write_run(tmp_path, "grpo_norm", dumps={400: random_dump(3, 0.3), 1000: random_dump(4, 0.6)}),
    ]
    runs = read(*folders)
    grpo, vl = made(runs, "results")
    alone = made([runs[0]], "results")[0]
    for column in ("Avg@8", "Pass@8", "monotonicity"):
        assert vl[column] == alone[column]
    assert (grpo["step"], vl["step"]) == ("1000", "450 of 1000")
    assert (grpo["seeds"], vl["seeds"]) == (1, "1 of 2")
    unfinished = ["vl_norm-1.0-0 (450 of 1000)", "vl_norm-1.0-1 (400 of 1000, not in its row)"]
    assert looked_at(runs)["Not finished"] == unfinished
    assert "Rows stand at different steps" in foot(runs)
    assert "3072 tokens (450, 1000)" in foot(runs)
    # Both were validated at step 400, where seed 0 is in both.
    gap = np.mean(list(random_dump(0, 0.4).values())) - np.mean(list(random_dump(3, 0.3).values()))
    assert grpo["VL Norm minus this"].value == pytest.approx(gap)
    assert grpo["VL Norm minus this"].note == "one seed; at step 400; 1 of 2 seeds: no interval"
    assert np.isnan(grpo["VL Norm minus this"].low)


def test_one_seed_that_is_ahead_does_not_leave_out_the_others(tmp_path: Path) -> None:
    """As with --watch, or where one seed has an extra last validation."""
    steps = {0: (10, 20, 30), 1: (10, 20), 2: (10, 20)}
    for root, rate, method in (("a", 0.7, "vl_norm:1.0"), ("b", 0.3, "dapo_norm")):
        for seed, validated in steps.items():
            made_up = {step: random_dump(100 * seed + step + len(root), rate) for step in validated}
            write_run(tmp_path / root, method, seed, dumps=made_up)
    dapo, vl = made(read(*(tmp_path / root for root in "ab")), "results")
    assert (vl["seeds"], vl["step"], dapo["seeds"]) == (3, "20 of 1000", 3)
    assert (dapo["VL Norm minus this"].state, dapo["VL Norm minus this"].note) == ("established", "")


DIFFERENTLY = "Counted as seeds of one method, but configured differently"


def test_seeds_with_other_configurations_are_named(tmp_path: Path) -> None:
    """A sweep whose runs all have one seed, or none, looks like seeds."""
    for seed, rate in enumerate((1e-6, 1e-5)):
        configure(write_run(tmp_path, seed=seed, curve={10: 0.5}), actor_rollout_ref__actor__optim__lr=rate)
        write_run(tmp_path, "dapo_norm", seed, curve={10: 0.4})
    (which,) = looked_at(read(tmp_path))[DIFFERENTLY]
    assert which.startswith("VL Norm (α = 1) (")
    assert which.endswith("; actor_rollout_ref.actor.optim.lr)")


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_m_and_a_critics_mode_are_no_part_of_the_methods_name(estimator: str, tmp_path: Path) -> None:
    """A critic that no run has does not matter."""
    for seed, (m, mode) in enumerate(((None, "vl_norm"), (600, "token-mean"))):
        configure(
            write_run(tmp_path, seed=seed, curve={10: 0.5}),
            actor_rollout_ref__actor__loss_scale_factor=m,
            critic__loss_agg_mode=mode,
            algorithm__adv_estimator=estimator,
        )
    rows = {row["key"]: row["values"] for row in made(read(tmp_path), "settings")}
    label = "VL Norm (α = 1) seed"
    expected = {"actor_rollout_ref.actor.loss_scale_factor": f"None: {label} 0; 600: {label} 1"}
    if estimator == "gae":
        expected["critic.loss_agg_mode"] = f"vl_norm: {label} 0; token-mean: {label} 1"
    assert rows == expected
    assert DIFFERENTLY in looked_at(read(tmp_path))


def test_what_tells_honest_seeds_apart_is_no_other_configuration(tmp_path: Path) -> None:
    """Among it what verl and the launcher write: names of the run, seeds, roots of data, environments of Ray."""
    for seed in (0, 1):
        names = {"project_name": f"study {seed}", "experiment_name": f"run {seed}"}
        variables = {"TENSORBOARD_DIR": f"runs/{seed}", "WANDB_API_KEY": f"hunter2-{seed}"}
        configure(
            write_run(tmp_path / "runs", seed=seed, curve={10: 0.5}),
            trainer=names | {"logger": ["file"] * (seed + 1), "wandb_proxy": f"http://hunter2-{seed}@proxy"},
            actor_rollout_ref__rollout__trace=names,
            actor_rollout_ref__actor__data_loader_seed=seed,
            data={"seed": seed, "train_files": f"/disk{seed}/math/train.parquet"},
            ray_kwargs__ray_init__runtime_env__env_vars=variables,
            reward__judge={"api_key": f"hunter2-{seed}", "Password": f"hunter2-{seed}", "hf_token": f"hunter2-{seed}"},
        )
    runs = read(tmp_path / "runs")
    assert DIFFERENTLY not in looked_at(runs)
    assert made(runs, "settings") == []
    report(tmp_path / "runs", out=tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*.*") if b"hunter2" in file.read_bytes()]


def test_other_training_data_and_tools_are_named(tmp_path: Path) -> None:
    rollout = "actor_rollout_ref.rollout"
    for seed in (0, 1):
        configure(
            write_run(tmp_path, seed=seed, curve={10: 0.5}),
            data__train_files=["/d/math/train.parquet", f"/d/extra{seed}/train.parquet"],
            actor_rollout_ref__rollout__multi_turn__tool_config_path=f"tools/{seed}.yaml",
            actor_rollout_ref__rollout__agent__agent_loop_config_path=f"loops/{seed}.yaml",
            reward__reward_model__model_path=f"/models/judge-{seed}",
            trainer__resume_from_path=f"/runs/{seed}",
        )
    rows = {row["key"]: row["values"] for row in made(read(tmp_path), "settings")}
    expected = {f"{rollout}.multi_turn.tool_config_path", f"{rollout}.agent.agent_loop_config_path"}
    assert rows.keys() == {"data.train_files", "reward.reward_model.model_path", *expected}
    assert rows["data.train_files"].startswith("extra0/train, math/train: VL Norm (α = 1) seed 0; ")


def test_a_sweep_of_one_seed_says_what_is_left_out(tmp_path: Path) -> None:
    """Runs with one seed and another learning rate are no two samples of one method."""
    for name, rate, curve in (("a", 1e-6, {10: 0.5}), ("b", 5e-6, {10: 0.6, 20: 0.7}), ("c", 5e-6, {10: 0.6})):
        configure(write_run(tmp_path / name, curve=curve), actor_rollout_ref__actor__optim__lr=rate)
    odd = looked_at(read(tmp_path))
    what = "Left out, another run has the same seed"
    assert odd[what] == ["c/vl_norm-1.0-0"]
    configured = f"{what}, but another configuration (label=PATH for each such run)"
    assert odd[configured] == ["a/vl_norm-1.0-0 (actor_rollout_ref.actor.optim.lr)"]
    labelled = read(tmp_path / "b", f"slow={tmp_path}/a")
    assert [row["method"] for row in made(labelled, "results")] == ["VL Norm (α = 1)", "slow"]
    assert configured not in looked_at(labelled)


def test_runs_whose_seed_is_not_known_are_named(tmp_path: Path) -> None:
    for day in (1, 2):
        folder, config = tmp_path / f"2026-01-0{day}", "actor_rollout_ref: {actor: {loss_agg_mode: vl_norm}}"
        put(folder / "metrics.jsonl", text((0, 10, 0.0)))
        put(folder / ".hydra" / "config.yaml", f"{config}\ndata: {{seed: null}}\n")
    runs = read(tmp_path)
    what = "Seed not known, so counted as one more (label@seed=PATH says it); the prompts may have the same order"
    assert looked_at(runs)[what] == [run.name for run in runs]
    assert not any("by their names" in what for what in looked_at(runs))
    assert what not in looked_at(runs[:1])


def test_a_run_that_ends_early_is_named_where_its_end_is_not_known(tmp_path: Path) -> None:
    what = "Ends before other runs of its setting; whether that was planned is not known"
    for name, last in (("vl_norm", 60), ("token-mean", 57), ("dr_grpo", 63)):
        put(tmp_path / f"{name}.jsonl", text((0, last, 0.0)))
    assert looked_at(read(tmp_path))[what] == ["token-mean (step 57)"]
    folders = [write_run(tmp_path / "known", planned=10, curve={10: 0.5})]
    folders += [write_run(tmp_path / "known", "dapo_norm", planned=20, curve={10: 0.5, 20: 0.5})]
    assert what not in looked_at(read(*folders))


def test_seeds_of_names_only_are_named(tmp_path: Path) -> None:
    """verl without data.seed has one order of the prompts; folders called _s0 and _s1 do not change it."""
    what = "Counted as seeds by their names, but without data.seed: the prompts have the same order in all of them"
    for seed in ("null", "1"):
        folder = tmp_path / seed
        for name in ("_s0", "_s1"):
            put(folder / f"vl_norm{name}" / "metrics.jsonl", text((0, 10, 0.0)))
            mode = "actor_rollout_ref: {actor: {loss_agg_mode: vl_norm}}"
            put(folder / f"vl_norm{name}" / ".hydra" / "config.yaml", f"{mode}\ndata: {{seed: {seed}}}\n")
    assert looked_at(read(tmp_path / "null"))[what] == ["VL Norm (α = 1) (all runs)"]
    assert what not in looked_at(read(tmp_path / "1"))


def test_an_accuracy_that_is_nan_from_a_step_on_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        content = text((0, 60, 0.0))
        if seed == 2:
            content = "".join(
                one.replace('mean@8": 0.', 'mean@8": NaN, "x": 0.') if json.loads(one)["step"] >= 30 else one
                for one in content.splitlines(keepends=True)
            )
        put(tmp_path / f"vl_norm_s{seed}.jsonl", content)
    runs = read(tmp_path)
    assert f"not a finite number from step 30 on: {KEY}" in runs[2].notes
    (row,) = made(runs, "results")
    assert (row["seeds"], row["step"], row["Avg@8"].value) == ("2 of 3", "60", pytest.approx(0.6))
    odd = looked_at(runs)
    assert odd["Accuracy is not a number any more"] == ["vl_norm_s2 (from step 30 on)"]
    assert "Not a finite number any more" not in odd
    assert odd["Left out of its row, not as far as another seed"] == ["vl_norm_s2 (step 20)"]


# ---------------------------------------------------------------------------------------------------------- differences


def test_the_difference_is_paired_within_a_setting_only(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "3b", dumps={10: random_dump(1, 0.6)}),
        write_run(tmp_path / "3b", "grpo_norm", dumps={10: random_dump(2, 0.4)}),
        write_run(tmp_path / "7b", "grpo_norm", dumps={10: random_dump(3, 0.4)}, recipe={"model": "7b"}),
    ]
    runs = read(*folders)
    rows = {(row["setting"].split(", ")[1], row["method"]): row["VL Norm minus this"] for row in made(runs, "results")}
    a, b = random_dump(1, 0.6), random_dump(2, 0.4)
    expected = np.mean([np.mean(a[p]) - np.mean(b[p]) for p in a])
    assert rows["3B", "GRPO Norm"].value == pytest.approx(expected)
    assert rows["3B", "GRPO Norm"].low < expected < rows["3B", "GRPO Norm"].high
    assert rows["7B", "GRPO Norm"] is None


def test_a_difference_that_cannot_be_paired_has_no_interval(tmp_path: Path) -> None:
    """Two seeds of other problems against one run of another seed, and runs without dumps."""
    dumps = [{f"{seed}-{p}": found for p, found in random_dump(seed, 0.5).items()} for seed in (0, 1)]
    vl = read(*(write_run(tmp_path, seed=seed, dumps={10: dumps[seed]}) for seed in (0, 1)))
    one = read_one(write_run(tmp_path, "grpo_norm", seed=2, dumps={10: random_dump(2, 0.5)}))
    bare = read_one(write_run(tmp_path, "dapo_norm", curve={10: 0.25}))
    for other, ours, note in ((one, vl, "not paired"), (bare, vl[:1], "not paired; 1 of 2 seeds: no interval")):
        found = measures.difference(vl, [other])
        expected = measures.final_accuracy(ours).value - measures.final_accuracy([other]).value
        assert found.value == pytest.approx(expected)
        assert (np.isnan(found.low), found.note) == (True, note)
    both = read(*(write_run(tmp_path / "x", "grpo_norm", seed, dumps={10: random_dump(seed, 0.4)}) for seed in (0, 1)))
    found = measures.difference(vl, both)
    assert (np.isnan(found.low), found.note) == (True, "not paired, other problems"), "the same seeds"
    assert measures.final_accuracy(vl).note == "other problems in each seed"
    assert measures.final_pass(vl).note == "other problems in each seed"


def test_a_difference_does_not_rest_on_a_few_common_problems(tmp_path: Path) -> None:
    """verl draws data.val_max_samples problems of the set for each data.seed: two runs share some of them."""
    ours = {f"p{i}": [1] * 8 for i in range(6)} | {f"a{i}": [0] * 8 for i in range(34)}
    theirs = {f"p{i}": [0] * 8 for i in range(6)} | {f"b{i}": [1] * 8 for i in range(34)}
    pair = read(write_run(tmp_path, dumps={10: ours}), write_run(tmp_path, "grpo_norm", dumps={10: theirs}))
    found = measures.difference(*([run] for run in pair))
    assert (found.value, found.note) == (pytest.approx(6 / 40 - 34 / 40), "not paired, other problems")
    assert np.isnan(found.low)


def test_runs_on_other_validation_sets_are_not_compared(tmp_path: Path) -> None:
    curves = {"vl_norm:1.0": ("math500", 0.6), "grpo_norm": ("gsm8k", 0.8)}
    runs = read(
        *(
            write_run(tmp_path, method, seed, curve={500: last - 0.1, 1000: last + seed / 1000}, name=name)
            for method, (name, last) in curves.items()
            for seed in range(3)
        )
    )
    results = {row["method"]: row for row in made(runs, "results")}
    difference = results["GRPO Norm"]["VL Norm minus this"]
    assert (np.isnan(difference.value), difference.note) == (True, "other validation sets, so no comparison")
    assert made(runs, "speedup") == []
    (found,) = verdict.verdicts(groups.Comparison(runs))
    assert found.claim == "highest of 2, established over none"
    assert found.over[0].words == "other validation sets, so no comparison with VL Norm (α = 1)"
    ((what, which),) = [item for item in looked_at(runs).items() if "validation sets" in item[0]]
    assert "not compared" in what
    assert which == [f"vl_norm-1.0-{seed} (math500 instead of gsm8k)" for seed in range(3)]
    # Nor is the mean over seeds of other sets a number.
    mixed = [runs[0], runs[-1]]
    assert np.isnan(measures.final_accuracy(mixed).value)
    assert measures.final_accuracy(mixed).note == "other validation sets in each seed"


def test_without_dumps_a_difference_is_paired_by_seed(tmp_path: Path) -> None:
    ours, theirs = np.array([0.7, 0.7, 0.8]), np.array([0.2, 0.3, 0.2])
    vl, other = (
        read(*(write_run(tmp_path, method, s, curve={10: float(v)}) for s, v in enumerate(values)))
        for method, values in (("vl_norm:1.0", ours), ("dapo_norm", theirs))
    )
    found, gaps = measures.difference(vl, other), ours - theirs
    assert found.value == pytest.approx(gaps.mean())
    assert found.high - found.value == pytest.approx(4.302653 * gaps.std(ddof=1) / 3**0.5)
    assert (found.state, found.note) == ("established", "over seeds only")
    lacking = measures.difference(vl, other[1:])
    assert lacking.value == pytest.approx(gaps[1:].mean())
    assert (lacking.high, lacking.note) == (1, "over seeds only; 2 of 3 seeds")
    # Differences that float32 alone tells apart, of a log of tensorboard, are one number.
    same = read(
        *(write_run(tmp_path / "x", "dapo_norm", s, curve={10: v - 0.1 + 3e-8 * s}) for s, v in enumerate(ours))
    )
    assert measures.difference(vl, same).note == "the same in every seed; over seeds only"


@pytest.mark.parametrize("cut", [False, True])
def test_a_dump_that_is_missing_or_cut_is_named_and_leaves_the_difference_over_seeds(cut: bool, tmp_path: Path) -> None:
    dumps = [{step: random_dump(step + seed, 0.4) for step in (5, 10)} for seed in range(10)]
    folders = [write_run(tmp_path, seed=s, dumps=dumps[s], planned=10) for s in range(5)]
    others = [write_run(tmp_path, "dapo_norm", s, dumps=dumps[5 + s], planned=10) for s in range(5)]
    file = others[3] / "validation" / "10.jsonl"
    content = file.read_text()
    file.unlink()
    if cut:
        file.write_text(content[: len(content) // 3])
    runs = read(*folders, *others)
    dapo, vl = made(runs, "results")
    assert dapo["Avg@8"].note == "no usable dump of seed 3 at step 10, over seeds only"
    means = np.array([np.mean(list(of_run[10].values())) for of_run in dumps])
    gaps, found = means[:5] - means[5:], dapo["VL Norm minus this"]
    assert (found.value, found.note) == (pytest.approx(gaps.mean()), "over seeds only")
    assert found.high - found.value == pytest.approx(2.776445 * gaps.std(ddof=1) / 5**0.5)
    assert vl["Avg@8"].note == ""
    assert looked_at(runs)["No validation dump that can be used, so no interval over problems"] == [
        "dapo_norm-3 (step 10)"
    ]


def test_a_difference_is_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    vl = read(*(write_run(tmp_path, seed=s, dumps={10: random_dump(s, 0.6)}) for s in (0, 1, 2)))
    other = read(*(write_run(tmp_path, "dapo_norm", seed=s, dumps={10: random_dump(9 + s, 0.4)}) for s in (1, 2)))
    found, same = measures.difference(vl, other), measures.difference(vl[1:], other)
    assert (found.value, found.low, found.high) == (same.value, same.low, same.high)
    assert (found.note, same.note) == ("2 of 3 seeds", "")
    apart = measures.difference(vl[:1], other)
    assert (apart.note, np.isfinite(apart.low)) == ("one seed", True)


def test_a_difference_on_one_common_seed_of_two_has_no_interval(tmp_path: Path) -> None:
    def runs(method: str, *seeds: int) -> list[Run]:
        root = tmp_path / f"{method}{len(list(tmp_path.iterdir()))}"
        return read(*(write_run(root, method, s, dumps={10: random_dump(s + len(method), 0.5)}) for s in seeds))

    ours, one, other = runs("vl_norm:1.0", 0, 1), runs("dapo_norm", 1), runs("dapo_norm", 1, 2)
    found = measures.difference(ours, one)
    assert (np.isnan(found.low), found.note) == (True, "one seed; 1 of 2 seeds: no interval")
    assert found.value == pytest.approx(measures.difference(ours[1:], one).value)
    # Two seeds on each side are two samples, whatever their numbers.
    apart = measures.difference(ours, other)
    assert apart.value == pytest.approx(measures.final_accuracy(ours).value - measures.final_accuracy(other).value)
    paired = measures.difference(ours[1:], one)
    assert (apart.high - apart.low > paired.high - paired.low, apart.note) == (True, "")


def test_a_difference_is_of_the_seeds_that_were_validated_at_its_step(tmp_path: Path) -> None:
    ours = read(
        write_run(tmp_path, dumps={10: random_dump(0, 0.5), 20: random_dump(1, 0.6)}),
        write_run(tmp_path, seed=1, dumps={10: random_dump(2, 0.5)}),
    )
    other = read_one(write_run(tmp_path, "dapo_norm", seed=5, dumps={20: random_dump(3, 0.4)}))
    found, alone = measures.difference(ours, [other]), measures.difference(ours[:1], [other])
    assert found == alone
    assert found.low < found.value < found.high


def test_without_a_step_in_common_there_is_no_difference(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, curve={10: 0.5}), write_run(tmp_path, "grpo_norm", curve={15: 0.5})]
    grpo, _ = made(runs := read(*folders), "results")
    assert np.isnan(grpo["VL Norm minus this"].value)
    assert grpo["VL Norm minus this"].note == "no validated step in common"
    (found,) = verdict.verdicts(groups.Comparison(runs))
    assert found.over[0].words == "no validated step in common with VL Norm (α = 1)"


def test_the_vl_norm_that_others_are_compared_with() -> None:
    of_paper, other = Setting("aggregation", "math", "3b", "3072"), Setting(task="x")
    keys = ["dapo_norm", "vl_norm:0.5", "vl_norm:0.75", "vl_norm:1", "vl_norm"]
    assert groups.main_vl_norm(of_paper, keys) == "vl_norm:0.75"
    assert groups.main_vl_norm(of_paper, ["vl_norm:0.5", "vl_norm:1"]) is None
    assert groups.main_vl_norm(other, keys) == "vl_norm:1"
    assert groups.main_vl_norm(other, keys[:3]) == "vl_norm:0.75"
    assert groups.main_vl_norm(other, ["dapo_norm", "vl_norm"]) is None
    as_coded = ["vl_norm_as_coded:0.75", "dapo_norm_as_coded"]
    assert groups.main_vl_norm(of_paper, as_coded) == "vl_norm_as_coded:0.75"
    assert groups.main_vl_norm(of_paper, keys + as_coded) == "vl_norm:0.75"


# --------------------------------------------------------------------------------------------------------- monotonicity


def test_monotonicity_is_kendalls_tau_over_the_validations(tmp_path: Path) -> None:
    curve = {0: 0.1, 50: 0.3, 100: 0.2, 150: 0.4, 200: 0.4}
    pairs = list(itertools.combinations(curve.values(), 2))
    concordant, tied = sum(b > a for a, b in pairs), sum(a == b for a, b in pairs)
    tau = (concordant - (10 - concordant - tied)) / np.sqrt(10 * (10 - tied))
    run = read_one(write_run(tmp_path, curve=curve))
    assert measures.monotonicity([run]).value == pytest.approx(tau)
    assert measures.monotonicity([run]).note == "one seed; no dumps"
    falling = read_one(write_run(tmp_path, seed=1, curve={0: 0.9, 100: 0.7, 200: 0.5}))
    found = measures.monotonicity([run, falling])
    assert found.value == pytest.approx((tau - 1) / 2)
    assert (found.low, found.high) == (-1, 1)


def test_monotonicity_of_one_seed_has_an_interval_over_problems(tmp_path: Path) -> None:
    dumps = {step: random_dump(step, 0.3 + step / 100) for step in (0, 10, 20, 30)}
    found = measures.monotonicity([read_one(write_run(tmp_path, dumps=dumps))])
    assert found.note == "one seed"
    assert found.low < found.value <= found.high


@pytest.mark.parametrize(
    ("dumps", "note"),
    [
        ({0: [0, 0, 1], 1: [0, 1, 1]}, "one seed; two validations"),
        ({0: [0], 1: [1], 2: [1]}, "one seed; a set of one problem"),
        ({0: [0, 0], 1: [1, 1], 2: [1, 1]}, "one seed; the same in every resample"),
    ],
)
def test_a_monotonicity_without_an_interval_says_why(dumps: dict[int, list[int]], note: str, tmp_path: Path) -> None:
    named = {step: {f"p{i}": [right] * 8 for i, right in enumerate(found)} for step, found in dumps.items()}
    found = measures.monotonicity([read_one(write_run(tmp_path, dumps=named))])
    assert found.value > 0
    assert (np.isnan(found.low), found.note) == (True, note)


@pytest.mark.parametrize("shared", [2, 24])
def test_a_monotonicity_with_an_interval_lies_in_it(shared: int, tmp_path: Path) -> None:
    """verl draws 16 other problems for each validation: accuracy rises by these, and falls on the shared ones."""
    rising = {0: [0] * 8, 1: [0, 1] * 4, 2: [1] * 8}
    dumps = {
        step: random_dump(step, 0.6 - step / 10, shared) | {f"{step} {i}": responses for i in range(16)}
        for step, responses in rising.items()
    }
    found = measures.monotonicity([read_one(write_run(tmp_path, dumps=dumps))])
    assert found.value == 1
    if shared == 24:
        assert found.low < 1 == found.high
    else:
        assert (np.isnan(found.low), found.note) == (True, "one seed; other problems in each validation")


# -------------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize(
    ("mode", "logged", "more", "expected"),
    [
        # Each response's tokens have 0.25 nats; lengths 3, 10 and 2000, M = 64.
        ("vl_norm", 3 * 0.25 / (64 * (1 / 3 + 1 / 10 + 1 / 2000)), {}, 0.25),
        ("token-mean", 0.25, {}, 0.25),
        ("seq-mean-token-mean", 0.25, {}, 0.25),
        ("seq-mean-token-sum-norm", 671 * 0.25 / 64, {"response_length/mean": 671.0}, 0.25),
        ("seq-mean-token-sum-norm", 671 * 0.25 / 64, {}, None),  # no lengths
        ("seq-mean-token-sum", 671 * 0.25, {"response_length/mean": 671.0}, None),
    ],
)
def test_entropy_is_nats_a_token_where_the_modes_scale_is_known(
    tmp_path: Path, mode: str, logged: float, more: dict[str, float], expected: float | None
) -> None:
    if mode == "vl_norm":  # Σ L^(1-α) and M Σ L^-α
        more = {"actor/vl_norm/weighted_tokens": 3.0, "actor/vl_norm/divisor": 64 * (1 / 3 + 1 / 10 + 1 / 2000)}
    run = read_one(put(tmp_path / f"{mode}.jsonl", record(1, actor__entropy=logged, **more)))
    run.scale_factor = 64.0
    found = measures.entropy_per_token(run)
    assert found is None if expected is None else found == pytest.approx([expected])


# -------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(("limit", "share"), [(256, [0.0, 0.5]), (None, [0.25, 0.5])])
def test_no_response_is_cut_off_in_a_batch_shorter_than_the_limit(
    limit: int | None, share: list[float], tmp_path: Path
) -> None:
    """verl's V1 trainer pads to the longest response, and counts how many are as long as that."""
    lengths = [{"response_length/max": 200.0, "response_length/clip_ratio": 0.25}]
    lengths += [{"response_length/max": 256.0, "response_length/clip_ratio": 0.5}]
    lines = "".join(record(step, **logged) for step, logged in enumerate(lengths, 1))
    run = read_one(put(tmp_path / "vl_norm.jsonl", lines))
    run.limit = limit
    found = measures.cut_off_share(run)
    assert found is not None
    assert found.tolist() == share


def test_the_limit_is_of_the_runs_configuration(tmp_path: Path) -> None:
    config = {
        "data": {"limit": 512, "max_response_length": "${data.limit}"},
        "actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}},
    }
    put(tmp_path / "config.yaml", yaml.safe_dump(config))
    put(tmp_path / "metrics.jsonl", record(1, **{"response_length/clip_ratio": 0.25}))
    run = read_one(tmp_path)
    assert run.limit == 512
    assert measures.cut_off_share(run) == pytest.approx([0.25])  # without the longest response, as verl logs it
