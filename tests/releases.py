"""What recipes/test_releases.sh runs in the environment of each release of verl, and the table over releases.

    python -m tests.releases run [--verl-repo DIR] [--part NAME]
                                     with the environment's python; writes .releases/<X>/results.json
    python -m tests.releases table   writes .releases/table.md, prints it

Only the standard library is imported here: each part below starts processes of its own, with a time limit and a log in
.releases/<X>/logs. A part that fails is a problem in the results, never the end of the others.

verl's own tests come from the release's wheel, which has them as a package `tests`, and from verl's repository where
one is given. They run as verl's CI runs them, without VERL_PLATFORM and without a network, once with this package's
plugin and once without. What matters is that each test ends the same way; tests that fail in both are listed as such.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.origin import commit, machine

ROOT = Path(__file__).parent.parent
RELEASES = ROOT / ".releases"
PACKAGES = ("torch", "transformers", "numpy", "tensordict", "ray")
EXACT = ((1, "float64"), (2, "float64"), (4, "float64"), (2, "float32"))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
OUR_TESTS = (
    "tests/test_aggregation.py",
    *(f"tests/test_plugin_{part}.py" for part in ("agg_loss", "config", "install", "losses")),
)
# The part `stock` below is that test with a table.
OUR_TESTS_NOT = ("test_stock_modes_are_bit_identical",)
# verl before 0.9.0 has no entry-point group, no platform for the CPU, no V1 trainer and no critic.loss_scale_factor:
# tests that are about one of those, or start a process with VERL_PLATFORM=cpu.
OUR_TESTS_NOT_BEFORE_0_9 = (
    "test_found_by_import_verl",
    "test_verls_trainers_reduce_each_metric",
    "test_registering_twice",
    "test_load_failure_is_heard",
    "test_every_name_of_the_table",
    "test_mode_alone_is_enough",
    "test_run_with_a_critic",
    "test_critic_alone",
    "test_a_critic_on_a_mode",
    "test_a_critics_own_mini_batches",
    "test_refused_before_ray_starts",
    "test_mini_batches_sorted_by_length",
    "test_importance_weights_with_two_bounds",
)
# Globs below verl's folder `tests`: what touches losses, their configuration, the engines and the data between them.
VERL_TESTS = (
    "test_*_cpu.py",  # DataProto, base configuration
    "experimental/fully_async_policy/*_cpu.py",
    "models/test_fused_kernels_ulysses_sp_on_cpu.py",
    "models/test_moe_zloss_per_token_loss.py",
    "plugin/test_*.py",
    # Of those that start Ray, the one whose workers take DataProto and TensorDict; each other start costs 10 s.
    "single_controller/test_decorator_on_cpu.py",
    "single_controller/test_get_set_dispatch_collect_cpu.py",
    "trainer/**/test_*_cpu.py",
    "trainer/ppo/test_rollout_corr*.py",
    "utils/megatron/*_cpu.py",
    "utils/test_config_on_cpu.py",
    "utils/test_fsdp*_cpu.py",
    "utils/test_groupwise.py",
    "utils/test_import_utils_on_cpu.py",
    "utils/test_model_on_cpu.py",
    "utils/test_padding_on_cpu.py",
    "utils/test_prepare_micro_batches_with_group_size.py",
    "utils/test_seqlen_balancing.py",
    "utils/test_torch_functional.py",
    "utils/test_transferqueue_utils_on_cpu.py",
    "workers/config/*_cpu.py",
    "workers/test_*.py",
)
# They start TransferQueue, whose actors wait for ever where Ray has two CPUs. There is nothing of losses in them.
VERL_TESTS_OF_MORE_CPUS = ("test_reissue_inflight_on_cpu.py", "test_replay_buffer_on_cpu.py")
# They want NCCL or flash-attn on any machine, and take minutes to say so.
VERL_TESTS_OF_GPUS = "not test_distributed_mean and not test_distributed_masked and not distributed_params"
TEST_SECONDS, PART_SECONDS = 300, 1800
HEAD = """# Releases of verl

Written by `bash recipes/test_releases.sh --verl-repo DIR`, and copied by `cp .releases/table.md
docs/results/releases.md`.
Run on: {machine}. Seeds are fixed in the programs. *Exact*, *refused*, *absent*: as in [support](../support.md). A
*matrix row* is one feature with one mode (`tests/engine/features.py`).

"""
ENDS = {"error": "error", "failure": "failed", "skipped": "skipped"}  # JUnit's word: ours, the worst first
# After the tests, since importing verl before them could hide what they are about.
PYTEST = """
import sys, pytest
code = pytest.main(sys.argv[1:])
import verl
from verl.trainer.ppo import core_algos
print("plugin:", "on" if hasattr(core_algos.agg_loss, "__wrapped__") else "off")
sys.exit(code)
"""


@dataclass
class Answer:
    """What a part found: its rows of the table, what should not be, and tests of verl's that fail by themselves."""

    cells: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)


class Release:
    """Runs processes in the environment of one release of verl, and the parts that are made of them."""

    def __init__(self, verl_repository: Path | None) -> None:
        self.name = metadata.version("verl")
        self.before_0_9 = version_of(self.name) < (0, 9)
        self.verl_repository = verl_repository
        self.folder = RELEASES / self.name
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def environment(self, plugin: bool) -> dict[str, str]:
        """As a user switches the package on and off; the entry-point group exists since 0.9.0."""
        left_out = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES", "PYTHONPATH")
        variables = {name: value for name, value in os.environ.items() if name not in left_out}
        variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        variables["RAY_ADDRESS"] = "local"  # else tests would join a Ray that happens to run on this machine
        if not self.before_0_9:
            variables["VERL_USE_EXTERNAL_PLUGINS"] = "auto" if plugin else "none"
        elif plugin:
            variables["VERL_USE_EXTERNAL_MODULES"] = "vlnorm_verl.verl_entry"
        return variables

    def run(self, name: str, command: list[str], plugin: bool = True, cwd: Path = ROOT) -> str:
        """Standard output and error of a python command.

        Raises:
            RuntimeError: it failed or ran past the limit; the message has the end of the log.
        """
        print(f"  {name} …", flush=True)
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with open(log, "w") as file:
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=cwd,
                    env=self.environment(plugin),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=PART_SECONDS,
                )
                code: int | str = done.returncode
            except subprocess.TimeoutExpired:
                code = f"none within {PART_SECONDS} s"
        text = log.read_text(errors="replace")
        if code != 0:
            raise RuntimeError(f"exit status {code}, {log}: {' '.join(text.split())[-600:]}")
        return text

    def results(self, name: str, module: str, *options: str, plugin: bool = True) -> list[dict[str, Any]]:
        """The JSON rows of one of the programs in tests/engine."""
        out = self.logs / f"{name.replace(' ', '-')}.json"
        self.run(name, ["-m", f"tests.engine.{module}", *options, "--out", str(out)], plugin)
        return json.loads(out.read_text())

    def pytest(self, name: str, files: list[str], plugin: bool, cwd: Path, select: str = "") -> dict[str, str]:
        """Outcome of every test, as `outcomes` has it.

        Raises:
            RuntimeError: pytest itself died, or the plugin was not as it was to be.
        """
        report = self.logs / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)  # of a run before
        # The engines' packages, which tests/test_other_engines.py installs, are the same for all releases.
        options = ["-q", "-o", f"cache_dir={RELEASES / 'cache'}", f"--timeout={TEST_SECONDS}"]
        options += ["--continue-on-collection-errors", f"--junitxml={report}", *(["-k", select] if select else [])]
        try:
            text = self.run(name, ["-c", PYTEST, *options, *files], plugin, cwd)
        except RuntimeError:
            # Status 1 is that some test failed, which is in the report.
            text = (self.logs / f"{name.replace(' ', '-')}.log").read_text(errors="replace")
            if not report.exists():
                raise
        expected = f"plugin: {'on' if plugin else 'off'}"
        if expected not in text.splitlines()[-20:]:
            raise RuntimeError(f"{name}: not '{expected}': {' '.join(text.split())[-300:]}")
        return outcomes(report)

    # -------------------------------------------------------------------------------------------------------- parts

    def exact(self) -> Answer:
        """Relative error of the whole gradient, worst over the scenarios; a wrong sum must be seen."""
        answer = Answer()
        for ranks, dtype in EXACT:
            options = ("--ranks", str(ranks), "--dtype", dtype)
            rows = self.results(f"exact {ranks} {dtype}", "scenarios", *options)
            result = judge_exactness(rows, TOLERANCE[dtype])
            answer.problems += [f"{ranks} × {dtype}: {row}" for row in result.bad]
            name = f"exactness, {ranks} rank{'s' * (ranks > 1)}, {dtype}: worst relative error (gradients)"
            answer.cells[name] = f"{result.worst:.1e} ({result.gradients})"
        return answer

    def features(self) -> Answer:
        """What became of the rows of tests/engine/features.py, which says itself what must."""
        answer = Answer()
        for ranks in (1, 2, 4):
            rows = self.results(f"features {ranks}", "features", "--ranks", str(ranks), "--dtype", "float64")
            answer.problems += [f"{ranks} ranks: {row}" for row in rows if not feature_is_good(row)]
            counts = Counter(row["kind"] for row in rows)
            answer.cells[f"matrix rows, {ranks} rank{'s' * (ranks > 1)}"] = ", ".join(
                f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: item[0] == "absent")
            )
        return answer

    def stock(self) -> Answer:
        """Whether verl's own modes give the same gradients and metrics, to the bit, with and without the plugin."""
        runs = []
        for plugin in (True, False):
            name = f"stock {'with' if plugin else 'without'} plugin"
            rows = self.results(name, "scenarios", "--ranks", "2", "--dtype", "float32", "--stock", plugin=plugin)
            if {row.pop("plugin") for row in rows} != {plugin}:
                raise RuntimeError(f"{name}: the plugin was not {'on' if plugin else 'off'}")
            runs.append(rows)
        different = [a["mode"] for a, b in zip(*runs, strict=True) if a != b]
        cell = f"{len(runs[0]) - len(different)} of {len(runs[0])}"
        return Answer({"verl's own modes bit-identical with and without": cell}, different)

    def engines(self) -> Answer:
        """The engines other than FSDP2; the file says which cannot be run with which release."""
        result = self.pytest("engines", ["tests/test_other_engines.py", "-m", "slow or not slow"], True, ROOT)
        return Answer({"tests of other engines": counted(result)}, not_passed(result))

    def our_tests(self) -> Answer:
        left_out = (*OUR_TESTS_NOT, *(OUR_TESTS_NOT_BEFORE_0_9 if self.before_0_9 else ()))
        result = self.pytest("our tests", list(OUR_TESTS), True, ROOT, f"not ({' or '.join(left_out)})")
        return Answer({"this package's tests": counted(result)}, not_passed(result))

    def verl_tests(self) -> Answer:
        """verl's own tests with the plugin and without: counts, and every test that ends another way."""
        folder = self.folder / "verl-tests"
        source = collect_verl_tests(self.name, self.verl_repository, folder)
        found = {file for glob in VERL_TESTS for file in (folder / "tests").glob(glob)}
        files = sorted(str(file.relative_to(folder)) for file in found if file.name not in VERL_TESTS_OF_MORE_CPUS)
        ours, stock = (
            self.pytest(f"verl tests {how} plugin", files, how == "with", folder, VERL_TESTS_OF_GPUS)
            for how in ("with", "without")
        )
        ends = {name: (ours.get(name, "not run"), stock.get(name, "not run")) for name in sorted({*ours, *stock})}
        different = [
            f"{name}: {with_plugin}; without the plugin {without}"
            for name, (with_plugin, without) in ends.items()
            if kind(with_plugin) != kind(without)
        ]
        failing = [name for name, both in ends.items() if {*map(kind, both)} <= {"failed", "error"}]
        cells = {
            "verl's own tests, with the plugin": counted(ours),
            "verl's own tests, without the plugin": counted(stock),
            "tests of verl that fail in both": str(len(failing)),
            "tests of verl that end another way": str(len(different)),
            "verl's tests from": source,
        }
        return Answer(cells, different + ([] if "passed" in stock.values() else ["no test passed"]), failing)


PARTS = ("exact", "features", "stock", "engines", "our_tests", "verl_tests")


def version_of(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


class Exactness(NamedTuple):
    bad: list[dict[str, Any]]  # rows that are not as they should be
    gradients: int
    worst: float  # relative error of a gradient, the largest
    least_wrong: float  # the same of a wrong sum, the smallest: it must be seen


def judge_exactness(rows: list[dict[str, Any]], bound: float) -> Exactness:
    """rows: what tests.engine.scenarios writes. An error is relative to the gradient's norm, so that must not be 0."""
    wrong = [row for row in rows if row["scenario"].startswith("sabotage")]
    empty = [row for row in rows if not any(row["lengths"])]
    honest = [row for row in rows if row not in wrong and row not in empty]
    bad = [row for row in wrong if not row["error"] > 0.1]
    bad += [row for row in empty if not row["norm"] == row["error"] == 0]
    bad += [row for row in honest if not (row["error"] <= bound and row["norm"] > 1e-3)]
    worst = max((row["error"] for row in honest), key=lambda error: error if error == error else float("inf"))
    return Exactness(bad, len(honest), worst, min((row["error"] for row in wrong), default=float("nan")))


def feature_is_good(row: dict[str, Any], bound: float = TOLERANCE["float64"]) -> bool:
    """row: what tests.engine.features writes."""
    if row["kind"] != row["expected"]:
        return False
    if row["kind"] == "exact":
        return row["error"] <= max(bound, row["rounding"]) and row["norm"] > 1e-3 and row["wrong"] > 0.1
    return row["kind"] == "absent" or bool(row["at_config"])


def outcomes(report: Path) -> dict[str, str]:
    """{test id: outcome} of a JUnit file: "passed", or failed, error or skipped with ": " and why.

    The worst where a test has two (a failure and an error of its fixture). Of a file that cannot be imported only the
    text says why; where that has no line of an error, the message does.
    """
    out: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        outcome = "passed"
        if found := [child for tag in ENDS for child in case.findall(tag)]:
            why = re.search(r"^E +(.*)", f"{found[0].text}\nE {found[0].get('message')}", re.MULTILINE)
            outcome = f"{ENDS[found[0].tag]}: {why[1][:300]}"  # type: ignore[index]
        out[name] = outcome if out.get(name, "passed") == "passed" else out[name]
    return out


def kind(outcome: str) -> str:
    return outcome.partition(":")[0]


def counted(result: dict[str, str]) -> str:
    counts = Counter(map(kind, result.values()))
    return f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed, {counts['skipped']} skipped"


def not_passed(result: dict[str, str]) -> list[str]:
    """Tests that failed, and why; "no test passed" as well if none did."""
    none_passed = [] if "passed" in result.values() else ["no test passed"]
    failed = sorted(f"{name}: {end}" for name, end in result.items() if kind(end) in ("failed", "error"))
    return failed + none_passed


def collect_verl_tests(release: str, repository: Path | None, folder: Path) -> str:
    """Put verl's tests into `folder`/tests; says where they are from.

    The wheel's own files last: where both have a file, it is the release's.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = f"the wheel of {release}"
    if repository is not None:
        tag = nearest_tag(release, repository)
        archive = folder / "tests.tar"
        git = ["git", "-C", str(repository), "archive", "--format=tar", f"--output={archive}"]
        subprocess.run([*git, tag, "tests", "scripts"], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
        source += f" and {tag} of the repository"
    installed = Path(sysconfig.get_path("purelib"))
    shutil.copytree(installed / "tests", folder / "tests", dirs_exist_ok=True)
    # Some tests read verl's configuration below the working directory.
    (folder / "verl").symlink_to(installed / "verl")
    # Else pytest would find the settings of this project in a folder above.
    (folder / "pytest.ini").write_text("[pytest]\n")
    return source


def nearest_tag(release: str, repository: Path) -> str:
    """The release's tag, else the newest one before it.

    Raises:
        RuntimeError: the repository has no tag that old.
    """
    listed = subprocess.run(["git", "-C", str(repository), "tag"], check=True, capture_output=True, text=True)
    tags = [tag for tag in listed.stdout.split() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    older = [tag for tag in tags if version_of(tag) <= version_of(release)]
    if not older:
        raise RuntimeError(f"{repository} has no tag of verl {release} or of a release before it")
    return max(older, key=version_of)


# ------------------------------------------------------------------------------------------------------ the commands


def run(verl_repository: Path | None, only: list[str]) -> bool:
    """Every part, or only some beside what the others gave before; whether all is good."""
    release = Release(verl_repository)
    file = release.folder / "results.json"
    before = json.loads(file.read_text()) if only and file.exists() else {}
    print(f"verl {release.name}", flush=True)
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    origin = f"{datetime.date.today().isoformat()}, {commit()}"
    results = {"versions": versions, "machine": machine(), "parts": before.get("parts", {})}
    for name in only or PARTS:
        try:
            answer = getattr(release, name)()
        except Exception as error:  # the other parts still say something
            answer = Answer({name: "failed"}, [f"{type(error).__name__}: {error}"])
        results["parts"][name] = asdict(answer) | {"origin": origin}
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        for problem in answer.problems:
            print(f"  PROBLEM {name}: {problem}", flush=True)
    return not any(part["problems"] for part in results["parts"].values())


def print_table() -> bool:
    """Over all releases that have results, oldest first; whether all are good."""
    files = sorted(RELEASES.glob("*/results.json"), key=lambda file: version_of(file.parent.name))
    if not files:
        print(f"No results in {RELEASES}: run `bash recipes/test_releases.sh` first", file=sys.stderr)
        return False
    everything = {file.parent.name: json.loads(file.read_text()) for file in files}
    columns, failing, problems = {}, {}, []
    for release, results in everything.items():
        parts = {name: results["parts"].get(name, {"problems": ["not run"]}) for name in PARTS}
        columns[release] = dict(results["versions"])
        for name, part in parts.items():
            columns[release] |= part.get("cells", {})
            problems += [f"- {release}, {name}: {problem}" for problem in part["problems"]]
            for test in part.get("failing", []):
                failing.setdefault(test, []).append(release)
        origins = dict.fromkeys(part["origin"] for part in parts.values() if "origin" in part)
        columns[release]["run on, at commit"] = " and ".join(origins)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [["", *(f"verl {release}" for release in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    text = HEAD.format(machine="; ".join(dict.fromkeys(results["machine"] for results in everything.values())))
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if problems:
        text += "\nProblems:\n\n" + "\n".join(problems) + "\n"
    (RELEASES / "table.md").write_text(text)
    print(text)
    if failing:
        print("Tests of verl's that fail with the plugin and without it:\n")
        print(*(f"- {test}: {', '.join(releases)}" for test, releases in sorted(failing.items())), sep="\n")
    return not problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="all parts on the installed release of verl")
    runner.add_argument("--verl-repo", type=Path, help="a checkout of verl's repository, for more of its tests")
    runner.add_argument("--part", choices=PARTS, action="append", default=[], help="only this one; the others stay")
    commands.add_parser("table", help="the table over all releases that have results")
    args = parser.parse_args()
    good = run(args.verl_repo, args.part) if args.command == "run" else print_table()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
