"""What recipes/test_releases.sh runs in the environment of each release of verl, and the table over releases.

    python -m tests.releases run [--verl-repo DIR] [--part NAME]
                                     with the environment's python; writes .releases/<X>/results.json
    python -m tests.releases table   writes .releases/table.md and table.json, prints the table

Only the standard library is imported here: each part below is a process of its own, with a time limit and a log in
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
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.origin import commit, machine

ROOT = Path(__file__).parent.parent
RELEASES = ROOT / ".releases"
PARTS = ("exact", "features", "stock", "engines", "our_tests", "verl_tests")
PACKAGES = ("torch", "transformers", "numpy", "tensordict", "ray")
EXACT = ((1, "float64"), (2, "float64"), (4, "float64"), (2, "float32"))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
FEATURES_RANKS = (1, 2, 4)
OUR_TESTS = (
    "tests/test_aggregation.py",
    *(f"tests/test_plugin_{part}.py" for part in ("agg_loss", "config", "install", "losses")),
)
# The part `stock` below is that test with a table.
OUR_TESTS_NOT = ("test_stock_modes_are_bit_identical",)
# verl before 0.9.0 has no entry-point group, no platform for the CPU, no V1 trainer and no critic.loss_scale_factor,
# and its gspo ignores the mode: tests that are about one of those, or start a process with VERL_PLATFORM=cpu.
OUR_TESTS_NOT_BEFORE_0_9 = (
    "test_found_by_import_verl",
    "test_registering_twice",
    "test_load_failure_is_heard",
    "test_every_name_of_the_table",
    "test_mode_alone_is_enough",
    "test_run_with_a_critic",
    "test_critic_alone",
    "test_a_critic_on_a_mode",
    "test_refused_before_ray_starts",
    "geo_mean",
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
TEST_SECONDS, PART_SECONDS = 120, 1800
HEAD = """# The last run of `bash recipes/test_releases.sh`

`cp .releases/table.md docs/releases.md`. Run on: {machine}. Seeds are fixed in the programs. *Exact*, *refused*,
*absent*: as in [support.md](support.md); rows are those of `tests/engine/features.py`.

"""
# After the tests, since importing verl before them could hide what they are about.
PYTEST = """
import sys, pytest
code = pytest.main(sys.argv[1:])
import verl
from verl.trainer.ppo import core_algos
print("plugin:", "on" if hasattr(core_algos.agg_loss, "__wrapped__") else "off")
sys.exit(code)
"""


class Part:
    """Runs processes of one release: environment, log, time limit."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.folder = RELEASES / release
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def environment(self, plugin: bool) -> dict[str, str]:
        """As a user switches the package on and off; the entry-point group exists since 0.9.0."""
        left_out = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES", "PYTHONPATH")
        env = {name: value for name, value in os.environ.items() if name not in left_out}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["RAY_ADDRESS"] = "local"  # else tests would join a Ray that happens to run on this machine
        if version_of(self.release) >= (0, 9):
            env["VERL_USE_EXTERNAL_PLUGINS"] = "auto" if plugin else "none"
        elif plugin:
            env["VERL_USE_EXTERNAL_MODULES"] = "vlnorm_verl.verl_entry"
        return env

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
        self.run(name, ["-m", module, *options, "--out", str(out)], plugin)
        return json.loads(out.read_text())

    def pytest(self, name: str, files: list[str], plugin: bool, cwd: Path, select: str = "") -> dict[str, str]:
        """Outcome of every test: passed, failed, error or skipped.

        Raises:
            RuntimeError: pytest itself died, or the plugin was not as it was to be.
        """
        report = self.logs / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)  # of a run before
        # The engines' packages, which tests/test_other_engines.py installs, are the same for all releases.
        options = ["-q", "-o", f"cache_dir={RELEASES / 'cache'}", f"--timeout={TEST_SECONDS}"]
        options += ["--continue-on-collection-errors"]
        options += ["-k", select] if select else []
        try:
            text = self.run(name, ["-c", PYTEST, *options, f"--junitxml={report}", *files], plugin, cwd)
        except RuntimeError:
            # Status 1 is that some test failed, which is in the report.
            text = (self.logs / f"{name.replace(' ', '-')}.log").read_text(errors="replace")
            if not report.exists():
                raise
        expected = f"plugin: {'on' if plugin else 'off'}"
        if expected not in text.splitlines()[-20:]:
            raise RuntimeError(f"{name}: not '{expected}': {' '.join(text.split())[-300:]}")
        return outcomes(report)


def version_of(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def outcomes(report: Path) -> dict[str, str]:
    """Test id -> outcome of a JUnit file; the worst where a test has two (a failure and an error of its fixture)."""
    out: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "error" if "error" in kinds else "failed" if "failure" in kinds else "skipped" if kinds else "passed"
        out[name] = outcome if out.get(name, "passed") == "passed" else out[name]
    return out


# ------------------------------------------------------------------------------------------------------------ parts


def exactness(part: Part) -> dict[str, Any]:
    """What `judge_exactness` says of each number of ranks and type."""
    out = {}
    for ranks, dtype in EXACT:
        options = ("--ranks", str(ranks), "--dtype", dtype)
        rows = part.results(f"exact {ranks} {dtype}", "tests.engine.scenarios", *options)
        out[f"{ranks} × {dtype}"] = judge_exactness(rows, TOLERANCE[dtype])
    return out


def judge_exactness(rows: list[dict[str, Any]], bound: float) -> dict[str, Any]:
    """Relative error of the whole gradient, worst over the scenarios, and the smallest error of a wrong sum.

    rows: what tests.engine.scenarios writes.
    """
    wrong = [row["error"] for row in rows if row["scenario"].startswith("sabotage")]
    empty = [row["norm"] for row in rows if row["scenario"].startswith("no valid token")]
    honest = [row for row in rows if not row["scenario"].startswith(("sabotage", "no valid token"))]
    worst = max(honest, key=lambda row: row["error"] if row["error"] == row["error"] else float("inf"))
    good = worst["error"] <= bound and min(wrong) > 0.1 and not any(empty)
    return {
        "gradients": len(honest),
        "worst": worst["error"],
        "worst_scenario": f"{worst['scenario']}, {worst['mode']}",
        "sabotage_least": min(wrong),
        "good": good and all(row["norm"] > 1e-3 for row in honest),
    }


def features(part: Part) -> dict[str, Any]:
    """What became of policy losses and features, by number of ranks."""
    keys = ("row", "mode", "kind", "expected", "error", "wrong", "message", "at_config")
    out = {}
    for ranks in FEATURES_RANKS:
        options = ("--ranks", str(ranks), "--dtype", "float64")
        rows = part.results(f"features {ranks}", "tests.engine.features", *options)
        out[str(ranks)] = [
            {key: row[key] for key in keys if key in row} | {"good": feature_is_good(row)} for row in rows
        ]
    return out


def feature_is_good(row: dict[str, Any]) -> bool:
    """Whether a row that tests.engine.features wrote ended well, and as it expects of this release."""
    if row["kind"] != row["expected"]:
        return False
    return row["kind"] != "exact" or (row["error"] <= TOLERANCE["float64"] and row["wrong"] > 0.1)


def stock(part: Part) -> dict[str, Any]:
    """Whether verl's own modes give the same gradients and metrics, to the bit, with and without the plugin."""
    rows = []
    for plugin in (True, False):
        options = ("--ranks", "2", "--dtype", "float32", "--stock")
        name = f"stock {'with' if plugin else 'without'} plugin"
        rows.append(part.results(name, "tests.engine.scenarios", *options, plugin=plugin))
        if {row["plugin"] for row in rows[-1]} != {plugin}:
            raise RuntimeError(f"{name}: the plugin was not {'on' if plugin else 'off'}")
    keys = ("mode", "scenario", "gradient_sha256", "metrics")
    same = {a["mode"]: all(a[key] == b[key] for key in keys) for a, b in zip(*rows, strict=True)}
    return {"modes": same, "good": all(same.values())}


def our_tests(part: Part) -> dict[str, Any]:
    left_out = OUR_TESTS_NOT if version_of(part.release) >= (0, 9) else (*OUR_TESTS_NOT, *OUR_TESTS_NOT_BEFORE_0_9)
    result = part.pytest("our tests", list(OUR_TESTS), True, ROOT, f"not ({' or '.join(left_out)})")
    return counted(result) | {"good": bool(result) and not bad(result)}


def engines(part: Part) -> dict[str, Any]:
    """The engines other than FSDP2; the file says which cannot be run with which release."""
    result = part.pytest("engines", ["tests/test_other_engines.py", "-m", "slow or not slow"], True, ROOT)
    return {"tests": result, "good": not bad(result) and "passed" in result.values()}


def counted(result: dict[str, str]) -> dict[str, Any]:
    counts = {kind: sum(outcome == kind for outcome in result.values()) for kind in ("passed", "skipped")}
    return counts | {"failed": bad(result)}


def bad(result: dict[str, str]) -> list[str]:
    return sorted(name for name, outcome in result.items() if outcome in ("failed", "error"))


def verl_tests(part: Part, repository: Path | None) -> dict[str, Any]:
    """verl's own tests with the plugin and without: counts, and every test that ends another way."""
    folder = part.folder / "verl-tests"
    source = collect_verl_tests(part.release, repository, folder)
    found = {file for glob in VERL_TESTS for file in (folder / "tests").glob(glob)}
    files = sorted(str(file.relative_to(folder)) for file in found if file.name not in VERL_TESTS_OF_MORE_CPUS)
    select = VERL_TESTS_OF_GPUS
    results = {
        plugin: part.pytest(f"verl tests {'with' if plugin else 'without'} plugin", files, plugin, folder, select)
        for plugin in (True, False)
    }
    names = sorted(results[True].keys() | results[False].keys())
    pairs = {name: [results[plugin].get(name, "not run") for plugin in (True, False)] for name in names}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return {
        "source": source,
        "files": len(files),
        "with": counted(results[True]),
        "without": counted(results[False]),
        "different": different,
        "good": not different and counted(results[False])["passed"] > 0,
    }


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
        command = [
            "git",
            "-C",
            str(repository),
            "archive",
            "--format=tar",
            f"--output={archive}",
            tag,
            "tests",
            "scripts",
        ]
        subprocess.run(command, check=True)
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


def run(repository: Path | None, only: list[str]) -> bool:
    """Every part, or only some, on the installed release; whether all is good, with what the others gave before."""
    release = metadata.version("verl")
    print(f"verl {release}", flush=True)
    part = Part(release)
    results: dict[str, Any] = {
        "release": release,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    parts = {
        "exact": lambda: exactness(part),
        "features": lambda: features(part),
        "stock": lambda: stock(part),
        "engines": lambda: engines(part),
        "our_tests": lambda: our_tests(part),
        "verl_tests": lambda: verl_tests(part, repository),
    }
    if only and (part.folder / "results.json").exists():
        before = json.loads((part.folder / "results.json").read_text())
        results["commit"] = " and ".join(dict.fromkeys([before["commit"], results["commit"]]))
        results |= {name: before[name] for name in PARTS if name in before and name not in only}
    for name, function in parts.items():
        if only and name not in only:
            continue
        try:
            results[name] = function()
        except Exception as error:  # the other parts still say something
            results[name] = {"failure": f"{type(error).__name__}: {error}"}
        write_json(part.folder / "results.json", results)
    found = problems(results)
    for problem in found:
        print(f"  PROBLEM {problem}", flush=True)
    return not found


def problems(results: dict[str, Any]) -> list[str]:
    """What should not be, one line each; empty if the release is supported as claimed."""
    out = []
    for name in PARTS:
        part = results.get(name, {"failure": "not run"})
        if "failure" in part:
            out.append(f"{name}: {part['failure']}")
        elif name == "exact":
            out += [f"exact, {key}: {value}" for key, value in part.items() if not value["good"]]
        elif name == "features":
            out += [
                f"features, {ranks} ranks: {row}" for ranks, rows in part.items() for row in rows if not row["good"]
            ]
        elif not part["good"]:
            what = {"stock": "modes", "engines": "tests", "our_tests": "failed", "verl_tests": "different"}[name]
            out.append(f"{name}: {part[what]}")
    return out


# ------------------------------------------------------------------------------------------------------------ table


def table(everything: list[dict[str, Any]]) -> str:
    """A Markdown table, one column a release."""
    rows: dict[str, list[str]] = {}
    for results in everything:
        for name, cell in cells(results).items():
            rows.setdefault(name, []).append(cell)
    head = ["", *(f"verl {results['release']}" for results in everything)]
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(results: dict[str, Any]) -> dict[str, str]:
    out = {"python": results["python"]} | {name: results["versions"][name] for name in PACKAGES}
    exact, feature_rows = results.get("exact", {}), results.get("features", {})
    for ranks, dtype in EXACT:
        row = exact.get(f"{ranks} × {dtype}")
        name = f"exactness, {ranks} rank{'s' * (ranks > 1)}, {dtype}: worst relative error (gradients)"
        out[name] = f"{row['worst']:.1e} ({row['gradients']}){mark(row)}" if row else "failed"
    for ranks in FEATURES_RANKS:
        rows = feature_rows.get(str(ranks))
        out[f"policy losses and features, {ranks} rank{'s' * (ranks > 1)}"] = features_cell(rows) if rows else "failed"
    same = results.get("stock", {})
    out["verl's own modes bit-identical with and without"] = (
        f"{sum(same['modes'].values())} of {len(same['modes'])}" if "modes" in same else "failed"
    )
    other = results.get("engines", {})
    out["tests of other engines"] = (
        f"{list(other['tests'].values()).count('passed')} passed" if other.get("good") else "failed"
    )
    out["this package's tests"] = count_cell(results.get("our_tests", {}))
    tests = results.get("verl_tests", {})
    for key in ("with", "without"):
        out[f"verl's own tests, {key} the plugin"] = count_cell(tests.get(key, {}))
    out["tests of verl that fail in both"] = str(len(failing(results))) if "with" in tests else "failed"
    out["tests of verl that end another way"] = str(len(tests["different"])) if "different" in tests else "failed"
    out["verl's tests from"] = tests.get("source", "")
    out["run on, at commit"] = f"{results['date']}, {results['commit']}"
    return out


def failing(results: dict[str, Any]) -> list[str]:
    """Tests of verl's that fail with the plugin and without."""
    with_plugin, without = (results.get("verl_tests", {}).get(key, {}).get("failed", ()) for key in ("with", "without"))
    return sorted(set(with_plugin) & set(without))


def features_cell(rows: list[dict[str, Any]]) -> str:
    kinds = [row["kind"] if row["good"] else "WRONG" for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("exact", "refused", "absent", "WRONG") if kind in kinds)


def count_cell(counts: dict[str, Any]) -> str:
    if "failed" not in counts:
        return "failed"
    return f"{counts['passed']} passed, {len(counts['failed'])} failed, {counts['skipped']} skipped"


def mark(row: dict[str, Any]) -> str:
    return "" if row["good"] else " WRONG"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_table() -> bool:
    """Over all releases that have results, oldest first; whether all are good."""
    files = sorted(RELEASES.glob("*/results.json"), key=lambda file: version_of(file.parent.name))
    if not files:
        print(f"No results in {RELEASES}: run `bash recipes/test_releases.sh` first", file=sys.stderr)
        return False
    everything = [json.loads(file.read_text()) for file in files]
    text = HEAD.format(machine="; ".join(dict.fromkeys(results["machine"] for results in everything)))
    text += table(everything)
    names: dict[str, list[str]] = {}
    for results in everything:
        for name in failing(results):
            names.setdefault(name, []).append(results["release"])
    if names:
        text += "\nTests of verl's that fail with the plugin and without it:\n\n"
        text += "".join(f"- `{name}`: {', '.join(releases)}\n" for name, releases in sorted(names.items()))
    lines = [f"- {results['release']}: {problem}" for results in everything for problem in problems(results)]
    text += "\nProblems:\n\n" + "\n".join(lines) + "\n" if lines else ""
    (RELEASES / "table.md").write_text(text)
    write_json(RELEASES / "table.json", everything)
    print((RELEASES / "table.md").read_text())
    return not lines


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
