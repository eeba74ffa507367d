"""Training on one thing after another: penalties against forgetting, sequences of tasks.

``penalty`` is the hook of the config section ``penalty`` (L2, EWC); ``sequence`` plans and runs
the tasks of ``llmtrain continual``, ``outcome`` computes its matrix and numbers.
"""
