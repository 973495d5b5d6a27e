"""The variables of a CPU run for a shell: `eval "$(python -m vlnorm_verl.cpu)"`."""

import shlex

from vlnorm_verl.cpu import cpu_environment

print("unset CUDA_VISIBLE_DEVICES")  # an empty one hides Ray's GPUs, too, which are only logical here
for name, value in cpu_environment().items():
    print(f"export {name}={shlex.quote(value)}")
