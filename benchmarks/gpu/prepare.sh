#!/usr/bin/env bash
# For a GPU machine without network, whose Python 3.12 has torch and transformers: packs what else the check needs. Run it
# on a machine with a package index and pip.
#
#   bash benchmarks/gpu/prepare.sh [engine|stack|both]     400 MB of wheels, minutes of compression
#
# .gpu/engine.tar.xz (16 MiB) has verl, Ray's Python part and what they need; .gpu/stack.tar.xz (52 MiB) vLLM and Ray's
# daemons. Two archives, since only so much may travel at once; left out is what a run of Qwen2 on an H100 or H200 does
# not load.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
what=${1:-both}
case $what in engine | stack | both) ;; *) echo "unknown argument '$what'; accepted: engine, stack, both" >&2; exit 2 ;; esac
for tool in xz strip; do
  command -v "$tool" > /dev/null || { echo "$tool is missing (packages xz-utils and binutils)" >&2; exit 2; }
done
here=benchmarks/gpu
python=${PYTHON:-python3}
wheels=.gpu/wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$wheels"

get() { # list of packages: wheels for the GPU machine
  local platforms=()
  # pip takes each name exactly.
  for name in manylinux_2_{17,24,26,27,28,31,34} manylinux{1,2010,2014}; do platforms+=(--platform "${name}_x86_64"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$wheels" --requirement "$1"
}

unpack() { # list, folder
  local name version wheel
  while IFS='=' read -r name _ version; do
    wheel=$(find "$wheels" -iname "$(sed -E 's/[-_.]+/[-_.]*/g' <<< "$name")-$version-*.whl")
    [ -f "$wheel" ] || { echo "not one wheel of $name $version in $wheels: '$wheel'" >&2; exit 1; }
    "$python" -m zipfile -e "$wheel" "$2"
  done < "$1"
  # Some wheels put folders of their repositories beside their package; "tests" would hide ours.
  rm -rf "$2"/{tests,recipe,scripts,tutorial} "$2"/*.data
}

pack() { # folder, file
  find "$1" -name __pycache__ -prune -exec rm -rf {} +
  tar -C "$1" --sort=name --owner=0 --group=0 -c . | xz -T0 --x86 --lzma2=preset=5,dict=64MiB > "$2.part"
  mv "$2.part" "$2"
  du -m "$2"
}

engine=$work/engine stack=$work/stack
mkdir -p "$engine" "$stack/ray/core/src/ray"
get "$here/packages-engine.txt"
unpack "$here/packages-engine.txt" "$engine"
# Hydra's parser has no wheel.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" antlr4-python3-runtime==4.9.3
"$python" -m zipfile -e "$work"/antlr4*.whl "$engine"
rm -rf "$engine"/ray/{jars,rllib,serve,tune,train,data,llm,air,core/libjemalloc.so,dashboard/client}
mv "$engine"/ray/core/src/ray/{raylet,gcs} "$stack/ray/core/src/ray/"
chmod +x "$stack"/ray/core/src/ray/*/*
[ "$what" = stack ] || pack "$engine" .gpu/engine.tar.xz
[ "$what" = engine ] && exit

get "$here/packages-stack.txt"
unpack "$here/packages-stack.txt" "$stack"
vllm=$stack/vllm
# Other kinds of attention, mixtures of experts, other front ends, sources.
rm -rf "$vllm"/{vllm-rs,_flashmla*.so,_qutlass_C*.so,_moe_C*.so,_rust_tool_parser*.so} \
  "$vllm"/vllm_flash_attn/_vllm_fa2_C*.so "$vllm"/third_party/{deep_gemm,fmha_sm100} \
  "$vllm"/entrypoints/serve/instrumentator/static/*.js
for library in "$vllm"/_C_stable_libtorch.abi3.so "$vllm"/vllm_flash_attn/_vllm_fa3_C.abi3.so; do
  "$python" "$here/strip_gpu_code.py" "$library"
  strip --strip-unneeded "$library"
done
pack "$stack" .gpu/stack.tar.xz
