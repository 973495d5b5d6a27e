"""From the launcher's locks to the end of a run on this machine, with what `start` gives in place of verl's trainer.

Covered: what is done before, between and after the trainer's starts, and what is refused there. Not covered: what the
launcher decides before (test_launch.py), the functions that mend a folder (test_run_folder.py), runs (test_e2e.py).
"""

import contextlib
import errno
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tests.test_launch import RECIPES, complete, composed
from tests.test_run_folder import configured, saved, there
from vlnorm_verl.files import UserError, locked
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import launch, locks
from vlnorm_verl.runs.logins import missing_logins
from vlnorm_verl.runs.process import Record, TrainingFailed
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.request import Request


@pytest.fixture
def run_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`launch.run_here` in tmp_path, with `start` in place of verl's trainer."""
    monkeypatch.setattr(locks, "OWN_RAY", tmp_path / "own-ray")
    monkeypatch.setattr(launch, "raise_on_stop", lambda: None)
    monkeypatch.setattr(launch, "make_tiny_files", lambda data, task: None)

    def run(
        start: Callable[..., Iterator[Record]], *overrides: str, console: Console | None = None, **given: Any
    ) -> int:
        monkeypatch.setattr(launch, "start", start)
        request = Request(RECIPES, ["model=tiny", f"recipe.folder={tmp_path}", *overrides], **given)
        asked = configs.compose(RECIPES / "config", request.overrides)
        return launch.run_here(request, asked, complete(request), console or terminal(quiet=True))

    return run


def no_start(*_: Any) -> Iterator[Record]:
    pytest.fail("started")


@pytest.mark.parametrize("is_smoke", [True, False])
def test_after_a_failure_a_run_goes_on_and_a_smoke_run_leaves_no_checkpoint(
    is_smoke: bool, tmp_path: Path, run_tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next smoke run has a new folder: the checkpoint would be lost."""
    fails, stoppable = iter([False, True] if is_smoke else [True]), list[str]()

    def start(config: DictConfig, *locks: IO[str]) -> Iterator[Record]:
        assert stoppable  # whatever it starts
        assert len(locks) == 2  # the folder's, and that of a Ray of its own
        folder = Path(config.recipe.folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "train.log").touch()
        if next(fails):
            raise TrainingFailed("verl's trainer ended.")
        yield {"step": 1, "data": {}}

    monkeypatch.setattr(launch, "raise_on_stop", lambda: stoppable.append("Ctrl-C"))
    console = terminal(record=True, file=io.StringIO())
    assert run_tiny(start, f"recipe.root={tmp_path}", console=console, smoke=is_smoke) == 1
    assert not list(fails)
    assert ("the same command goes on from there" in console.export_text()) != is_smoke
    assert bool(list(tmp_path.rglob("checkpoints"))) != is_smoke


def test_a_run_whose_checkpoint_is_gone_does_not_start(tmp_path: Path, run_tiny: Callable[..., int]) -> None:
    saved(tmp_path, 20, tracker="40")
    with pytest.raises(
        UserError, match=r"names step 40, which is not there: verl would begin anew.*, or write 20 into"
    ):
        run_tiny(no_start)


def test_checkpoints_of_an_earlier_start_make_room_while_this_one_trains(
    tmp_path: Path, run_tiny: Callable[..., int]
) -> None:
    def start(*_: Any) -> Iterator[Record]:
        for step in (40, 60):
            saved(tmp_path, step)
            yield {"step": step, "data": {}}

    saved(tmp_path, 20)
    keep = "trainer.max_actor_ckpt_to_keep=2", "recipe.keep=all"
    assert run_tiny(start, "recipe.steps=60", "trainer.test_freq=-1", *keep) == 0
    assert there(tmp_path) == [40, 60]


def test_a_disk_that_is_away_for_a_moment_ends_no_training(
    tmp_path: Path, run_tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any) -> Iterator[Record]:
        saved(tmp_path, 60)
        yield {"step": 60, "data": {}}

    def away(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(launch, "prune", away)
    assert run_tiny(start, "recipe.steps=60", "trainer.test_freq=-1", "recipe.keep=all") == 0


def test_the_same_command_tidies_a_finished_run(tmp_path: Path, run_tiny: Callable[..., int]) -> None:
    """One that was killed between its marker and that."""
    saved(tmp_path, 40)
    (tmp_path / "finished").write_text("40\n")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(configured(tmp_path, "model=tiny", "recipe.steps=40")))
    assert run_tiny(no_start, "recipe.steps=40") == 0
    assert not list(tmp_path.rglob("optim_*"))


def test_the_trainer_is_given_the_locks_and_on_a_cluster_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", lambda *arguments: iter([arguments]))
    config = composed(tmp_path, "model=tiny")
    with locked(tmp_path / "x") as lock:
        ((_, variables, _, _, *given),) = launch.start(config, lock)
        assert (variables, given) == ({}, [lock])
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ((_, variables, *_),) = launch.start(config)
    assert "WANDB_MODE" in variables["RAY_JOB_CONFIG_JSON_ENV_VAR"]


def test_two_runs_with_a_ray_of_their_own_are_refused(tmp_path: Path, run_tiny: Callable[..., int]) -> None:
    """Both would send their weights through one socket."""
    with locked(tmp_path / "own-ray"), pytest.raises(UserError, match="another run here has a Ray of its own"):
        run_tiny(no_start)
    assert not (tmp_path / "config.yaml").exists()  # it has not begun


def test_another_user_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the lock of whoever starts a Ray, and of verl's weight sync: both have a name in /tmp."""
    own = tmp_path / "own-ray"
    monkeypatch.setattr(locks, "OWN_RAY", own)

    def said() -> str:
        with pytest.raises(UserError) as error, contextlib.ExitStack() as stack:
            locks.hold_own_ray(stack)
        return str(error.value)

    with contextlib.ExitStack() as stack:
        locks.hold_own_ray(stack)
    assert own.stat().st_mode & 0o777 == 0o700
    (socket := tmp_path / "rl-colocate-zmq-01000000-replica-0-rank-0.sock").touch()
    with contextlib.ExitStack() as stack:
        locks.hold_own_ray(stack)  # verl makes it anew where a killed run of the same user left it
    with monkeypatch.context() as patched:
        patched.setattr(locks.os, "getuid", lambda: own.stat().st_uid + 1)
        assert f"{socket} of another user is in the way of verl's weight sync" in said()
        socket.unlink()
        assert said().startswith(f"{own} must be a folder of yours")
    shutil.rmtree(own)
    own.symlink_to(tmp_path)
    assert said().startswith(f"{own} must be a folder of yours")


def test_on_a_cluster_a_start_waits_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM repeats a job at once, and a network disk frees the lock of the lost node later."""
    console = terminal(record=True, file=io.StringIO(), width=400)
    with contextlib.ExitStack() as other, contextlib.ExitStack() as stack:
        other.enter_context(locked(tmp_path))
        with pytest.raises(UserError, match="if its node is lost, the file system frees the lock after a while"):
            locks.hold_folder(tmp_path, stack, console)
        assert console.export_text() == ""
        monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: other.close())
        locks.hold_folder(tmp_path, stack, console)
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    assert console.export_text() == f"{tmp_path}: another run is writing there; waiting 300 s for it …\n"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # stands for missing permission, which root does not lack
    with pytest.raises(UserError, match=r"Is a directory: .*recipe\.root=…"), contextlib.ExitStack() as stack:
        locks.hold_folder(tmp_path, stack, terminal(quiet=True))
    (tmp_path / "file").touch()
    request = Request(RECIPES, ["model=tiny", f"recipe.folder={tmp_path}/run", f"recipe.data={tmp_path}/file"])
    asked = configs.compose(RECIPES / "config", request.overrides)
    with pytest.raises(UserError, match=r"File exists: .*recipe\.data=…"):
        launch.run_here(request, asked, complete(request), terminal(quiet=True))


def test_a_start_that_waited_for_the_same_run_finds_it_finished(
    run_tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold_folder(folder: Path, stack: contextlib.ExitStack, console: Console) -> IO[str]:
        (folder / "finished").write_text("2\n")
        return stack.enter_context(locked(folder))

    monkeypatch.setattr(launch, "hold_folder", hold_folder)
    console = terminal(record=True, file=io.StringIO())
    assert run_tiny(no_start, console=console) == 0
    assert "finished; " in console.export_text()


LOGINS = ("API_KEY", "MODE", "IDENTITY_TOKEN_FILE", "ROOT", "SAVE_DIR")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without a login."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "NETRC",
        "WANDB_BASE_URL",
        *(f"{logger}_{name}" for logger in ("WANDB", "SWANLAB") for name in LOGINS),
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_missing_login_is_named(home: Path, run_tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_logins(["console", "file", "mlflow"]) == []
    (problem,) = missing_logins(["file", "wandb"])
    keys = "WANDB_API_KEY or WANDB_IDENTITY_TOKEN_FILE"
    assert problem == f"logger wandb needs {keys} (or WANDB_MODE=offline|disabled, or `wandb login`)"
    with pytest.raises(UserError, match=re.escape(problem)):
        run_tiny(no_start, loggers=["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert len(missing_logins(["wandb", "swanlab"])) == 1
    monkeypatch.delenv("WANDB_MODE")
    (home / ".netrc").write_text("machine github.com login user password x\n")
    assert missing_logins(["wandb"]) == [problem]


@pytest.mark.parametrize(
    ("logger", "variables", "files"),
    [
        ("wandb", {"WANDB_API_KEY": "x"}, {}),
        ("wandb", {"WANDB_IDENTITY_TOKEN_FILE": "/run/token"}, {}),
        ("wandb", {}, {".netrc": "machine api.wandb.ai"}),
        ("wandb", {"NETRC": "~/other/.netrc"}, {"other/.netrc": "machine api.wandb.ai"}),
        ("wandb", {"WANDB_BASE_URL": "https://tracking.example"}, {".netrc": "machine tracking.example"}),
        ("wandb", {}, {".netrc": "machine tracking.example", ".config/wandb/settings": "[default]"}),
        ("swanlab", {}, {".swanlab/.netrc": "machine tracking.example"}),
        ("swanlab", {"SWANLAB_ROOT": "other"}, {"other/.netrc": "machine tracking.example"}),
        ("swanlab", {"SWANLAB_ROOT": "other"}, {".swanlab/.netrc": "of swanlab login --local"}),
        ("swanlab", {"SWANLAB_SAVE_DIR": "other"}, {"other/.netrc": "machine tracking.example"}),
    ],
)
def test_a_login_that_is_there_is_enough(
    logger: str, variables: dict[str, str], files: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert len(missing_logins([logger])) == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    assert missing_logins([logger]) == []
