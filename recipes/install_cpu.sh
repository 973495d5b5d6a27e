#!/usr/bin/env bash
# Installs the CPU stack (verl, Ray, torch, vLLM, this package) into .venv in the project's root. installer.sh is how.
#
#   bash recipes/install_cpu.sh             what the quickstart and the tests need; a second call is quick
#   PYTHON=python3.12 bash recipes/install_cpu.sh    with another interpreter (3.11 or 3.12; default: python3)
set -euo pipefail
unset PYTHONPATH PYTHONHOME # else an environment module's packages come first
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "$1" >&2
  exit 2
}

case "${1:-}" in
  "") ;;
  -h | --help) sed -n '/^set/q; s/^# //p' recipes/install_cpu.sh; exit ;;
  *) fail "unknown argument '$1'; accepted: --help, or nothing" ;;
esac
[ "$(uname -sm)" = "Linux x86_64" ] || fail "$(uname -sm): the CPU stack is for x86-64 Linux"
requirements=recipes/requirements-cpu.txt
target=.venv
python=${PYTHON:-python3}
version() { "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2> /dev/null || true; }

wanted=$(cat "$requirements" pyproject.toml recipes/install_cpu.sh recipes/installer.sh | cksum)
stamp=$target/installed-cpu-stack
if [ -x "$target/bin/python" ]; then
  [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version "$target/bin/python")" ] ||
    fail "PYTHON=$python: $target has Python $(version "$target/bin/python"). Remove it (rm -rf $target) for another one"
  python=$target/bin/python
  [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ] || exit 0
  found=$("$python" vlnorm_verl/machine.py environment)
  case $found in
    *'"cuda": "'[!\"]* | *'"vllm": "'[!\"]*)
      [ -e "$stamp" ] ||
        fail "$target is an environment for GPUs ($found), which the CPU stack would overwrite. Give it another name"
      ;;
  esac
fi
release=$(version "$python")
case $release in
  3.11 | 3.12) ;;
  *)
    fail "$python ${release:+is Python }${release:-does not run}; 3.11 or 3.12 is needed (by verl and by numpy 2.3), \
named by PYTHON=python3.12. Where the system has none: uv python install 3.12, and then \
PYTHON=\$(uv python find --managed-python 3.12)"
    ;;
esac
"$python" -c 'import bz2, ctypes, lzma' ||
  fail "$python was built without a module of the standard library, named above. With pyenv: apt-get install \
libbz2-dev libffi-dev liblzma-dev, and build it again"
grep -qw avx2 /proc/cpuinfo ||
  fail "this CPU shows no AVX2, which vLLM's CPU build needs (in a virtual machine: CPU type host)"
command -v lscpu > /dev/null || fail "lscpu is missing, which vLLM's CPU build asks: apt-get or dnf install util-linux"
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null ||
  fail "libnuma.so.1 is missing, which vLLM's CPU build needs: apt-get install libnuma1, or dnf install numactl-libs"

echo "Installing the CPU stack into $target (about 4 GB on disk; a minute or two on a fast line) …"
source recipes/installer.sh

install_cpu_torch
install --no-deps -r "$requirements"
# setuptools is in the set, so the package itself is built without fetching anything.
install --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
