"""The gradient lab: per-response gradients of any causal LM, and what they say about loss aggregation.

``tasks`` prompts and their rewards; ``models`` what can be examined, a verl checkpoint included; ``rollouts`` samples
responses; ``gradients`` computes the score gradient of each response; ``store`` the files between the two and the
analysis. Nothing is imported here.
"""
