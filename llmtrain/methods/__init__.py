"""Methods of papers that reach the training loop as hooks: one file each.

A config section names its hook by import path (``config.schema.RunConfig``); the loop imports
none of them. Formulas that need no loop lie with their own kind, such as ``loss.reweight``.
"""
