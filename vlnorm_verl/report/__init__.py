"""`vlnorm-verl report`: the paper's tables and figures from what verl's runs wrote."""
