"""What a run holds while it is there: its folder, and this machine's place for a Ray of its own.

A process that gets the open file of a lock holds it too, so a trainer keeps both if its launcher is killed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path
from typing import IO

from rich.console import Console

from vlnorm_verl.files import UserError, locked

# Held by a run that starts Ray itself. verl sends weights to vLLM through a socket in /tmp, whose name is that of Ray's
# job (workers/rollout/vllm_rollout/vllm_rollout.py:141): the first job of each Ray has the same, whoever's it is.
OWN_RAY = Path(f"/tmp/vlnorm-verl-{os.getuid()}")
WEIGHT_SOCKETS = "rl-colocate-zmq-01000000-*"  # beside it
LOCK_SECONDS = 300.0  # on a cluster, for a folder: a network disk frees the lock of a lost node only after a while


def hold_folder(folder: Path, stack: contextlib.ExitStack, console: Console) -> IO[str]:
    """The lock of a run's folder, held until `stack` is closed.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    patience = LOCK_SECONDS if os.environ.get("RAY_ADDRESS") else 0
    end, said = time.monotonic() + patience, False
    while True:
        try:
            return stack.enter_context(locked(folder))
        except BlockingIOError:
            if time.monotonic() >= end:
                raise UserError(
                    f"{folder}: another run is writing there; wait for it (if its node is lost, the file system frees "
                    "the lock after a while), or set recipe.folder=…"
                ) from None
        except OSError as error:
            raise UserError(f"{error}: give another folder with recipe.folder=… or recipe.root=…") from error
        if not said:
            console.print(f"{folder}: another run is writing there; waiting {patience:.0f} s for it …")
            said = True
        time.sleep(1)


def hold_own_ray(stack: contextlib.ExitStack) -> IO[str]:
    """The lock of a run that starts Ray itself, held until `stack` is closed.

    Raises:
        UserError: another such run is on this machine, of this user or of another one.
    """
    for path in OWN_RAY.parent.glob(WEIGHT_SOCKETS):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if path.lstat().st_uid != os.getuid():
                raise UserError(
                    f"{path} of another user is in the way of verl's weight sync: wait for their run (or, without "
                    "one, have them delete it), or give this one a /tmp of its own (a container)"
                )
    try:
        with contextlib.suppress(FileExistsError):
            OWN_RAY.mkdir(mode=0o700)
        there = OWN_RAY.lstat()  # a link, too, may be another user's
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid():
            raise PermissionError
        return stack.enter_context(locked(OWN_RAY))
    except PermissionError:
        raise UserError(f"{OWN_RAY} must be a folder of yours, for the lock of a run with a Ray of its own") from None
    except BlockingIOError:
        raise UserError(
            "another run here has a Ray of its own, and verl could mix the weights of the two; wait for it, or give "
            "this one a /tmp of its own (a container)"
        ) from None
