# Sourced by the recipes: goes to the project's folder, and sets `python` to that of the active environment, else of
# .venv-gpu, else of .venv. A run that cannot be done in that one (no CUDA in its torch, or no vLLM for CPUs) goes over
# to the other, or is refused.
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." # an exported CDPATH leads elsewhere, or prints the folder
unset PYTHONHOME
[ -n "${VERL_USE_EXTERNAL_MODULES:-}" ] || unset PYTHONPATH # else an environment module's packages come first
# Safe path: `pip install .` leaves vlnorm_verl.egg-info in this folder, which says nothing of the environment.
installed='import importlib.metadata as m; m.version("verl"); m.version("vlnorm-verl")'
python=""
for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} "$PWD"/{.venv-gpu,.venv}/bin/python python3; do
  if said=$(PYTHONSAFEPATH=1 "$candidate" -c "$installed" 2>&1); then
    python=$candidate
    break
  fi
  # It is there, and not just without verl: its Python was removed, say, or needs a module that is not loaded.
  if [ -e "$candidate" ] || [ -L "$candidate" ]; then
    case $said in *PackageNotFoundError*) ;; *) echo "$candidate does not work: ${said##*$'\n'}" >&2 ;; esac
  fi
done
if [ -z "$python" ]; then
  echo "Nothing is installed yet that works here. For GPUs: bash recipes/install_gpu.sh. For model=tiny: bash recipes/install_cpu.sh" >&2
  exit 2
fi
# In a conda environment packages in ~/.local come before its own; verl itself may be there (pip install --user).
! PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 "$python" -c "$installed" 2> /dev/null || export PYTHONNOUSERSITE=1
