"""Makes these samples from real runs: `python tests/report_samples/take.py runs/samples`. See README.md."""

import shutil
import sys
from pathlib import Path

from omegaconf import OmegaConf

HERE = Path(__file__).parent
KEPT = {
    "recipe": ("name", "seed", "steps", "family", "task", "alpha", "model", "length", "method"),
    "trainer": ("total_training_steps", "test_freq"),
    "data": ("max_response_length",),
}


def take(run: Path) -> None:
    folder = HERE / run.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "validation").mkdir(parents=True)
    for file in sorted(run.glob("metrics-*.jsonl")):
        shutil.copy(file, folder / file.name)
    dumps = sorted((run / "validation").glob("*.jsonl"), key=lambda file: int(file.stem))
    for file in dumps if run.name.endswith("256-vl_norm-seed0") else dumps[-1:]:
        shutil.copy(file, folder / "validation" / file.name)
    config = OmegaConf.load(run / "config.yaml")
    kept = {section: {key: config[section][key] for key in keys} for section, keys in KEPT.items()}
    kept["actor_rollout_ref"] = {"actor": {"loss_agg_mode": config.actor_rollout_ref.actor.loss_agg_mode}}
    OmegaConf.save(OmegaConf.create(kept), folder / "config.yaml")


for run in sorted(Path(sys.argv[1]).iterdir()):
    take(run)
