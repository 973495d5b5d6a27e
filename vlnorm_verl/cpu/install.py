"""Puts the platform and the patches into verl; called by vlnorm_verl.verl_entry inside `import verl`."""

import os

from vlnorm_verl.cpu import cpu_environment, is_active

_registered = False


def register() -> None:
    """Register the platform and the patches; does nothing unless VERL_PLATFORM=cpu. May be called again.

    Raises:
        PatchError: verl is not as expected.
    """
    global _registered
    if _registered or not is_active():
        return
    from vlnorm_verl.cpu import patches, verl_platform

    # VERL_PLATFORM=cpu alone is enough for a run that starts its own Ray: its processes inherit what is missing here.
    for name, value in cpu_environment().items():
        os.environ.setdefault(name, value)
    verl_platform.register()
    patches.apply()
    _registered = True
