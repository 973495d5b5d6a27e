"""DAPO's soft overlong punishment without its effect on validation (reward.reward_manager.name=SoftPunishment).

The punishment is verl's (experimental/reward_loop/reward_manager/dapo.py): with M = max_resp_len and a buffer of B
tokens, factor · min(0, (M − B − L)/B) is added to the reward. verl's manager does not know training from validation and
would put it into validation rewards too, as the authors' Math run did. Here rows whose extra_info.split is not "train"
keep their plain score.
"""

from typing import Any

from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager


class SoftPunishment(DAPORewardManager):
    """verl's dapo reward manager; punishes length in rows of the training split only.

    Raises:
        ValueError: a row has no extra_info.split, or the reward function returns no dict with a "score".
    """

    async def run_single(self, data: Any) -> dict[str, Any]:
        result = await super().run_single(data)
        extra = data[-1].non_tensor_batch.get("extra_info") or {}
        if "split" not in extra or "score" not in result["reward_extra_info"]:
            raise ValueError(
                "SoftPunishment needs extra_info.split in the data ('train' is punished) and a reward function that "
                'returns {"score": …}; `vlnorm-verl data` and vlnorm_verl.tasks give both'
            )
        if extra["split"] != "train":
            result["reward_score"] = result["reward_extra_info"]["score"]
        return result
