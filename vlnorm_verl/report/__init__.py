"""`vlnorm-verl report`: the paper's tables and figures from what verl's runs wrote.

In the order of the data: ``find`` runs, their ``identity`` (``names``), what is in ``trackers``; ``read``, ``dumps`` of
validations, ``run``. Numbers: ``estimates`` with intervals, ``measures``, ``first_hit``. ``groups`` compared, ``paper``
the published values. What is shown: ``tables``, ``verdict``, ``configs`` that differ, ``examples``, ``charts``
(``labels``; ``svg`` draws them for ``page``, ``plots`` as files). ``build`` writes all of it, ``changes`` says what
need not be read again. The lab uses ``estimates``, ``table``, ``writers``, ``style`` and ``page``, too.
"""
