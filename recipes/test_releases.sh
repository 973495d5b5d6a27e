#!/usr/bin/env bash
# Tests this package on several releases of verl, each in an environment of its own; `--help` says how.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The releases that are supported, and what the choice of versions must be kept from or helped with ("": nothing), and why.
declare -A also=(
  [0.7.1]="pyarrow<26" # verl wants numpy<2, pyarrow 26 refuses numpy 1 and says so only when it is imported
  [0.8.0]="pyarrow<26" # the same
  [0.9.0]="TransferQueue>=0.1.11" # the V1 trainer imports it, verl does not require it
  [0.9.1]="TransferQueue>=0.1.11" # the same
)
mapfile -t known < <(printf '%s\n' "${!also[@]}" | sort -V)

usage() {
  cat <<END
Usage: bash recipes/test_releases.sh [OPTION…] [RELEASE…]

Installs each release of verl as a user gets it (the newest of everything, but torch's CPU build), this checkout beside
it, and runs on it: the exactness tests on 1, 2 and 4 ranks, policy losses and features, other engines, the plugin's
own tests, and verl's own CPU tests with the plugin on and off. No GPU is needed.

  RELEASE           releases of verl; default: ${known[*]} and the newest one of the package index
  --verl-repo DIR   a checkout of verl's repository (bare is enough), for those of verl's tests that its wheels do not
                    have: the actor's, the engines' and the configuration's. A release without a tag there gets them
                    from the nearest tag before it; files that are in the wheel are always the wheel's
  --install-only    make the environments, run nothing
  --table-only      print the table of what has run before

  PYTHON=python3.12 bash recipes/test_releases.sh    with another interpreter (3.11 or 3.12; default: python3)

Examples:
  bash recipes/test_releases.sh                                  all releases
  bash recipes/test_releases.sh 0.8.0 --verl-repo ../verl        one, with all of verl's tests

Written to .releases: table.md, of which docs/results/releases.md is a copy, and for each release X/venv, X/results.json, X/logs.
An environment takes 2 to 3 GB, its tests about 15 minutes on two cores; a second call installs nothing. The exit status
is 1 if something failed that should not; the table says what.
END
}

fail() {
  echo "$1" >&2
  exit 2
}

releases=() repository="" only=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit ;;
    --verl-repo)
      [ $# -ge 2 ] || fail "--verl-repo needs a folder: a checkout of verl's repository"
      repository=$2
      shift
      ;;
    --install-only) only=install ;;
    --table-only) only=table ;;
    -*) fail "$1 is no option of this script; --help lists them" ;;
    *)
      [[ $1 =~ ^[0-9]+\.[0-9]+(\.[0-9a-z]+)*$ ]] || fail "$1 is no release of verl; write for instance 0.9.1"
      releases+=("$1")
      ;;
  esac
  shift
done
if [ -n "$repository" ] && ! git -C "$repository" rev-parse --git-dir > /dev/null 2>&1; then
  fail "--verl-repo $repository: no git repository is there"
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  fail "PYTHON=$python: Python 3.11 or 3.12 is needed; name one with PYTHON=python3.11"
fi

newest() { "$python" -m pip --disable-pip-version-check index versions verl 2> /dev/null | sed -n '1s/.*(\(.*\)).*/\1/p'; }
if [ ${#releases[@]} = 0 ]; then
  releases=("${known[@]}")
  latest=$(newest) || latest=""
  if [ -z "$latest" ]; then
    said="The package index does not say which release of verl is the newest: it is not tested"
    [ -z "${CI:-}" ] || fail "$said"
    echo "$said" >&2
  fi
  [[ -z $latest || " ${known[*]} " == *" $latest "* ]] || releases+=("$latest")
fi

# verl imports these without requiring them: einops for its functions in torch that do what flash-attn does on a GPU
# (utils/npu_flash_attn_utils.py), triton for the module of kernels that torchtitan's engine imports.
missing=(einops triton)
tools=(pytest pytest-timeout pytest-asyncio hypothesis)
# What this package's tests need of it; verl and torch are named already.
requirements() {
  "$python" - << 'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + [r for extra in ("recipes", "report") for r in project["optional-dependencies"][extra]]
print(*(r for r in needed if not r.startswith(("verl", "torch", "vlnorm", "TransferQueue"))), sep="\n")
END
}

make_environment() { # RELEASE
  local wanted needed
  target=.releases/$1/venv
  mapfile -t needed < <(requirements)
  local help=${also[$1]-${also[${known[-1]}]}} # of a release that is not in the list: as for the last one
  local packages=("verl==$1" ${help:+"$help"} setuptools "${missing[@]}" "${tools[@]}" "${needed[@]}")
  wanted=$("$python" --version; cat recipes/installer.sh; echo "${packages[@]}")
  [ "$(cat "$target/installed" 2> /dev/null)" = "$wanted" ] && return
  echo "Installing verl $1 into $target …"
  # One chain: `set -e` is off inside of a condition, and a broken environment must not be called finished.
  rm -rf "$target" && source recipes/installer.sh && install_cpu_torch &&
    # torch is named again, so that no CUDA build takes its place.
    install "$cpu_torch" "${packages[@]}" &&
    # --no-deps: also a release outside of the range that pyproject.toml names can be tried.
    install --no-deps --no-build-isolation --editable . &&
    echo "$wanted" > "$target/installed"
}

mkdir -p .releases
echo '*' > .releases/.gitignore
status=0
for release in "${releases[@]}"; do
  [ "$only" = table ] && break
  mkdir -p ".releases/$release"
  if ! make_environment "$release"; then
    echo "verl $release could not be installed" >&2
    status=1
    continue
  fi
  [ "$only" = install ] && continue
  ".releases/$release/venv/bin/python" -m tests.releases run ${repository:+--verl-repo "$repository"} || status=1
done
[ "$only" = install ] || "$python" -m tests.releases table || status=1
exit "$status"
