"""Rewards of the paper's two tasks, in the signature of verl's custom reward.

    reward.custom_reward_function.path=pkg://vlnorm_verl.rewards.countdown
    reward.custom_reward_function.path=pkg://vlnorm_verl.rewards.math

Both return ``score`` and ``acc`` (1.0 or 0.0) and ``outcome``, the name of a class in the module's ``OUTCOMES``. The
outcome is one string and not a number per class on purpose: verl bootstraps every numeric key over every prompt of a
validation, which for six more keys takes three times as long (benchmarks/rewards.py measures it).
"""
