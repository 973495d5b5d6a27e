"""The module that verl imports in every process (entry point `vlnorm` of the group `verl.plugins`, since verl 0.9.0).

Older releases know no entry points; VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry has them import it as well, if it
is set on every node before `ray start`.

verl discards what an entry point loads, so importing this module is the registration. verl also logs a plugin
that fails to load at DEBUG only (verl/__init__.py), where nobody sees it: hence the WARNING here. After a
failure stock verl goes on untouched, and a run that asks for `vl_norm` stops in verl's own
`ActorConfig.__post_init__`, which does not know the mode. With VERL_USE_EXTERNAL_MODULES verl itself is not imported.
"""

import logging
from types import ModuleType

logger = logging.getLogger(__name__)

try:
    import wrapt

    from vlnorm_verl import plugin

    plugin.register()
except Exception:
    logger.warning(
        "vlnorm-verl could not be loaded into verl: loss_agg_mode=vl_norm is not available here. The reason:",
        exc_info=True,
    )
    raise


def _add_trainer(_: ModuleType) -> None:
    try:
        import vlnorm_verl.paper.whole_groups  # noqa: F401  registers it
    except Exception as error:  # the import of verl must go on; it refuses the trainer's name itself
        logger.warning("vlnorm-verl cannot add the trainer of whole groups (%s: %s)", type(error).__name__, error)


wrapt.register_post_import_hook(_add_trainer, "verl.trainer.ppo.v1.trainer_sync")  # since verl 0.9.0

try:
    from vlnorm_verl.cpu import install

    install.register()
except Exception:
    logger.warning("vlnorm-verl could not set up VERL_PLATFORM=cpu in this process. The reason:", exc_info=True)
    raise
