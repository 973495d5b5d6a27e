"""The gradient lab: per-response gradients of any causal LM, and what they say about loss aggregation.

In the order of the work: ``tasks`` prompts and rewards; ``models`` what can be examined, a verl checkpoint included;
``rollouts`` samples responses by ``engines`` or ``vllm_engine``; ``gradients`` of ``parameters``, projected by
``sketch``; ``store`` the files between. Then numpy alone: ``gram`` inner products, ``jackknife`` intervals, ``slopes``
β, ``mini_batches`` and ``aggregations`` noise, bias and α, ``length_means`` what "unbiased" assumes, ``analysis`` all
of it. Then ``tables``, ``figures``, ``verdict`` and ``build`` what is written.
"""
