"""Training runs of recipes/: composed by Hydra, checked, started on verl and Ray, followed and resumed."""
