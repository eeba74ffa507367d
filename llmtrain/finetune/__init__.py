"""Training on one thing after another: penalties against forgetting, sequences of tasks.

``penalty`` is the hook of the config section ``penalty`` (L2, EWC). ``plan`` and ``sequence`` lay
out and run the tasks of ``llmtrain continual``; ``outcome`` computes the matrix of losses and its
numbers, ``show`` prints and draws.
"""
