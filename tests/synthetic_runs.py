"""Runs of known truth for the report: 5 methods × 3 seeds × 4 settings as verl's launcher leaves them.

    python -m tests.synthetic_runs OUT [--steps 1000] [--problems 64]

A response to problem i is correct with probability σ(b_i + (e_m + s)·(1 − exp(−4·step/steps))): b_i the problem's
ease, e_m the method's effect, s ~ N(0, SEED_SD) the seed's. Not all is well, and ODD says with which runs. Records are
verl's own (tests/report_samples) with the numbers that matter drawn anew; some responses hold markup.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from vlnorm_verl.methods import METHODS

SAMPLE = Path(__file__).parent / "report_samples" / "aggregation-countdown-tiny-256-vl_norm-seed0"
SEEDS, VALIDATIONS, RESPONSES, SEED_SD = 3, 20, 8, 0.06


class Place(NamedTuple):
    family: str
    task: str
    length: str


AGGREGATIONS = {"vl_norm": 1.3, "grpo_norm": 1.25, "dapo_norm": 0.75, "dr_grpo_norm": 0.7, "dr_grpo": 0.3}
# Effects e_m. In the third setting no method is better than another; in the first and last VL Norm is.
EFFECTS: dict[Place, dict[str, float]] = {
    Place("aggregation", "countdown", "3072"): AGGREGATIONS,
    Place("aggregation", "countdown", "8192"): AGGREGATIONS | {"grpo_norm": 2.0},
    Place("aggregation", "math", "8192"): dict.fromkeys(AGGREGATIONS, 0.5),
    Place("dapo", "countdown", "3072"): {
        "vl_norm": 1.6,
        "dapo": 0.9,
        "overlong_filtering": 0.8,
        "soft_punishment": 0.9,
        "vl_norm:0.5": 1.2,
    },
}
MATH = {"aime2024": 1, "amc": 3, "math500": 8, "minerva": 4}  # parts of the problems of Math, in sixteenths
ODD = {  # (setting, method, seed) -> what became of the run
    (Place("aggregation", "countdown", "3072"), "dr_grpo", 2): "unfinished",
    (Place("dapo", "countdown", "3072"), "soft_punishment", 1): "unfinished",
    (Place("aggregation", "countdown", "3072"), "dapo_norm", 0): "resumed",
    (Place("aggregation", "countdown", "8192"), "dr_grpo_norm", 1): "nan",
    (Place("aggregation", "countdown", "8192"), "dr_grpo_norm", 2): "empty",
    (Place("dapo", "countdown", "3072"), "overlong_filtering", 1): "absent",
    (Place("dapo", "countdown", "3072"), "overlong_filtering", 2): "absent",
}
VERBOSITY = {"vl_norm": 0.7, "grpo_norm": 0.5, "dapo_norm": 1.0, "dapo": 1.0}  # how far lengths grow


def _rise(share: float) -> float:
    return float(1 - np.exp(-4 * share))


def sets(place: Place, problems: int) -> list[str]:
    """The validation set of each problem."""
    if place.task != "math":
        return ["countdown"] * problems
    parts = [name for name, part in MATH.items() for _ in range(part)]
    return sorted(parts[index % 16] for index in range(problems))


def _ease(problems: int) -> np.ndarray:
    return np.linspace(-2.2, 1.4, problems)


def truth(place: Place, method: str, share: float = 1.0, problems: int = 64) -> float:
    """Expected accuracy over seeds at a share of the training."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    strength = (EFFECTS[place][method] + SEED_SD * nodes[:, None]) * _rise(share)
    chances = 1 / (1 + np.exp(-(_ease(problems) + strength)))
    return float(weights @ chances.mean(1) / weights.sum())


def write(out: Path, steps: int = 1000, problems: int = 64) -> dict[str, Path]:
    """Write all runs below `out`; {name: folder}."""
    samples = [json.loads(line)["data"] for line in (SAMPLE / "metrics-000.jsonl").read_text().splitlines()]
    written = {}
    for number, (place, method, seed) in enumerate(
        (place, method, seed) for place, effects in EFFECTS.items() for method in effects for seed in range(SEEDS)
    ):
        odd = ODD.get((place, method, seed), "")
        if odd == "absent":
            continue
        name = f"{place.family}-{place.task}-3b-{place.length}-{method.replace(':', '-alpha')}-seed{seed}"
        folder = written[name] = out / name
        (folder / "validation").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(_config(place, method, seed, steps)))
        if odd == "empty":
            continue
        last = steps * 3 // 5 if odd == "unfinished" else steps
        generator = np.random.default_rng([7, number])
        lines = list(_records(folder, place, method, last, steps, problems, samples, generator, odd))
        if odd == "resumed":  # what the first start logged after half of the steps was given up
            (folder / "metrics-000.jsonl").write_text("".join(lines[: steps * 7 // 10]))
            (folder / "metrics-001.jsonl").write_text("".join(lines[steps // 2 :]))
        else:
            (folder / "metrics-000.jsonl").write_text("".join(lines))
    return written


def _config(place: Place, method: str, seed: int, steps: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((SAMPLE / "config.yaml").read_text())
    name, _, alpha = method.partition(":")
    mode = name if METHODS[name].is_mode else "token-mean"
    if name == "vl_norm":
        mode += f":{alpha or (0.75 if place.task == 'math' else 1.0)}"
    config["recipe"] = {**place._asdict(), "method": name, "model": "3b", "seed": seed}
    actor = config["actor_rollout_ref"]["actor"]
    actor |= {"loss_agg_mode": mode, "optim": {"lr": 2e-6 if method == "dr_grpo" else 1e-6}}
    config["trainer"] = {"total_training_steps": steps}
    return config


def _records(
    folder: Path,
    place: Place,
    method: str,
    last: int,
    steps: int,
    problems: int,
    samples: list[dict[str, Any]],
    generator: np.random.Generator,
    odd: str,
) -> Iterator[str]:
    effect = EFFECTS[place][method] + SEED_SD * generator.standard_normal()
    of_set, every = np.array(sets(place, problems)), max(1, steps // VALIDATIONS)
    noise = generator.standard_normal((steps + 1, 4))
    growth = VERBOSITY.get(method.partition(":")[0], 0.8)
    vl_norm = method.startswith("vl_norm")
    trained = {k: v for k, v in samples[3].items() if not k.startswith("val") and (vl_norm or "/vl_norm/" not in k)}
    fixed = json.dumps({k: v for k, v in trained.items() if not k.startswith("training/outcome")})[1:-1]
    for step in range(last + 1):
        share = step / steps
        data: dict[str, float] = {}
        if step % every == 0 or step == last:
            chance = 1 / (1 + np.exp(-(_ease(problems) + effect * _rise(share))))
            correct = generator.random((problems, RESPONSES)) < chance[:, None]
            _dump(folder / "validation" / f"{step}.jsonl", of_set, correct, step, generator)
            for name in dict.fromkeys(of_set):
                value = float(correct[of_set == name].mean())
                best = float(correct[of_set == name].any(1).mean()) * 0.97
                data |= {f"val-core/{name}/acc/mean@8": value, f"val-core/{name}/acc/best@8/mean": best}
        if step == 0:
            yield json.dumps({"step": 0, "data": data}) + "\n"
            continue
        length = 300 * (1 + growth * 3 * share) * (1 + 0.05 * noise[step, 0])
        broken = odd == "nan" and step > 0.7 * steps
        data |= {
            "actor/entropy": float("nan") if broken else 0.5 * float(np.exp(-2 * share + 0.1 * noise[step, 1])),
            "actor/grad_norm": float("nan") if broken else float(0.3 * np.exp(0.4 * noise[step, 2])),
            "critic/score/mean": float(1 / (1 + np.exp(0.4 - effect * _rise(share))) + 0.03 * noise[step, 3]),
            "response_length/mean": float(length),
            "response_length/clip_ratio": float(0.02 + 0.1 * growth * share),
            "perf/total_num_tokens": float(1280 * length),
            "perf/time_per_step": float(40 + length / 10),
            "training/global_step": step,
        }
        if vl_norm:
            harmonic = length * (0.6 - 0.2 * share)
            data |= {
                "actor/vl_norm/length_mean": float(length),
                "actor/vl_norm/length_harmonic_mean": float(harmonic),
                "actor/vl_norm/variance_ratio": float((length / harmonic) ** 0.5),
                "actor/vl_norm/effective_responses": float(200 * (1 - 0.4 * share) + 5 * noise[step, 3]),
                "actor/vl_norm/weight_max": float(3 + 4 * share + 0.3 * abs(noise[step, 1])),
            }
        yield f'{{"step": {step}, "data": {{{fixed}, {json.dumps(data)[1:-1]}}}}}\n'


def _dump(path: Path, of_set: np.ndarray, correct: np.ndarray, step: int, generator: np.random.Generator) -> None:
    lengths = generator.integers(5, 40, correct.shape)
    with open(path, "w") as file:
        for index, (name, right) in enumerate(zip(of_set, correct, strict=True)):
            for attempt, is_right in enumerate(right):
                output = "7 + 5 = 12. " * int(lengths[index, attempt]) + ("" if attempt else "<b>bold</b><script>1")
                entry = {"input": f"problem {index}: make {index + 10}", "output": output, "gts": str(index + 10)}
                entry |= {"score": float(is_right), "acc": float(is_right), "step": step, "validation_set": name}
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=64, help="of each validation, 8 responses each")
    asked = parser.parse_args()
    print(f"{len(write(asked.out, asked.steps, asked.problems))} runs in {asked.out}")
