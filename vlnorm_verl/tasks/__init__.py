"""The tasks: a prompt, its data in verl's schema, and a reward in the signature of verl's custom reward.

    vlnorm-verl data countdown --out data/countdown     # train.parquet, test.parquet, manifest.json
    vlnorm-verl data math --out data/math               # train, math500, aime2024, amc, minerva
    reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.countdown
    reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.math

Both rewards return ``score`` and ``acc`` (1.0 or 0.0) and ``outcome``, the name of a class in the module's
``OUTCOMES``: one string and not a number per class, since verl bootstraps every numeric key (docs/rewards.md).
"""
