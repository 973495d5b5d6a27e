# Sourced by the scripts that install: `install`, `uninstall` and `install_cpu_torch` for the environment $target. By uv if
# it is there or pip can fetch it (a third of pip's time); by pip where there is none, and for what uv cannot install.

# From $python, where there is none, with the sourcing script's `fail`. Without ensurepip (Debian's python3-venv) it would
# stay half made.
if [ ! -x "$target/bin/python" ]; then
  glibc=$("$python" -c 'import os; print(os.confstr("CS_GNU_LIBC_VERSION").split()[1])' 2> /dev/null || true)
  [ "$(printf '2.31\n%s\n' "$glibc" | sort -V | head -n 1)" = 2.31 ] ||
    fail "glibc ${glibc:-not found}: the wheels need 2.31 or newer (Ubuntu 20.04, Debian 11, RHEL 9)"
  fresh=$([ -e "$target" ] || echo yes)
  "$python" -m venv "$target" || { [ -z "$fresh" ] || rm -rf "$target"; return 1; }
fi
# One whose making was broken off has no pip.
command -v uv > /dev/null || "$target/bin/python" -m pip --version > /dev/null 2>&1 ||
  "$target/bin/python" -m ensurepip > /dev/null

pip_install() { "$target/bin/python" -m pip --disable-pip-version-check --no-input install --no-user "$@"; }

# index=URL install …: from that index. (uv would not go by --index-url where UV_DEFAULT_INDEX is set.)
install() {
  if [ -n "$uv" ]; then
    "$uv" pip install --python "$target/bin/python" ${index:+--default-index "$index"} "$@" && return
    echo "uv could not; pip tries" >&2
  fi
  pip_install ${index:+--index-url "$index"} "$@"
}

uninstall() {
  if [ -n "$uv" ]; then
    "$uv" pip uninstall --python "$target/bin/python" "$@"
  else
    "$target/bin/python" -m pip --disable-pip-version-check uninstall --yes "$@"
  fi
}

# uv reads no pip.conf: where packages come from, and what is trusted, it is told in variables of its own.
# Those that are set already stay.
hand_on_pips_settings() {
  local settings
  # Sorted: a PIP_… variable comes before the files.
  settings=$("$target/bin/python" -m pip config list 2> /dev/null) || # uv's environments have no pip
    settings=$(python3 -m pip config list 2> /dev/null) || settings=""
  setting() { sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" <<< "$settings" | head -n 1 | sed 's/\\n/ /g; s/  */ /g; s/^ //'; }
  local main extra links cert proxy hosts
  main=$(setting index-url) extra=$(setting extra-index-url) links=$(setting find-links) cert=$(setting cert)
  proxy=$(setting proxy) hosts=$(setting trusted-host)
  [ -z "$main" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$main}
  [ -z "$extra" ] || export UV_INDEX=${UV_INDEX:-$extra} UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
  [ -z "$links" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-${links// /,}}
  [ -z "$cert" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}
  [ -z "$proxy" ] || export HTTP_PROXY=${HTTP_PROXY:-$proxy} HTTPS_PROXY=${HTTPS_PROXY:-$proxy}
  [ -z "$hosts" ] || export UV_INSECURE_HOST=${UV_INSECURE_HOST:-$hosts}
}

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  [ -x "$target/bin/uv" ] || pip_install --quiet uv || true
  [ ! -x "$target/bin/uv" ] || uv=$target/bin/uv
fi
if [ -n "$uv" ]; then
  hand_on_pips_settings
else
  echo "pip has no uv for this machine: it installs the packages itself, which takes minutes longer" >&2
fi

cpu_torch="torch==2.13.0+cpu"

# The machine's own index first (a mirror or a local wheel may have the CPU build), PyTorch's index of CPU wheels next.
# The exact "+cpu" version keeps a CUDA build out.
install_cpu_torch() {
  echo "Looking for $cpu_torch. If the configured index has none, errors follow here, and PyTorch's index is next."
  install --no-deps "$cpu_torch" && return
  echo "The configured index has no $cpu_torch; trying PyTorch's index of CPU wheels …"
  index=https://download.pytorch.org/whl/cpu install --no-deps "$cpu_torch"
}
