"""Averaging of weights, during training and between checkpoints.

``training`` is the hook of the config section ``average``: SFA, EMA, latest weights, Model Stock,
on each rank's own parts. ``copies`` holds copies of the parameters in their layout; ``formulas``
are the rules both sides share. ``offline.merge_models`` merges folders as a ``recipe`` says:
``sources`` reads them, ``methods`` are the rules, ``search`` judges merges by held-out loss,
``fisher`` estimates Fisher information.
"""
