"""verl's replay buffer with a short polling interval (`trainer.v1.sampler.custom_sampler`).

verl asks its queue every 2 s whether a batch is complete (trainer/ppo/v1/replay_buffer.py:144), so a step of a few
seconds is rounded up to the next 2 s. verl gives a custom sampler no group-filter settings
(trainer_base.py:162): `algorithm.filter_groups` needs verl's own buffer (custom_sampler.path=null).
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_INTERVAL_S = 0.05


class FastReplayBuffer(ReplayBuffer):
    """ReplayBuffer that polls every POLL_INTERVAL_S seconds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(poll_interval=POLL_INTERVAL_S, **kwargs)
