"""What the paper's runs add to verl beside the loss aggregation, each by a door of verl's. Nothing here is needed for
`loss_agg_mode=vl_norm`."""
