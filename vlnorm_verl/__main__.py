"""`python -m vlnorm_verl` is `vlnorm-verl`."""

from vlnorm_verl.cli import app

app(prog_name="vlnorm-verl")
