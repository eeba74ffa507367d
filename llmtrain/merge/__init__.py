"""Averaging of weights, during training and between checkpoints.

``training`` is the hook of the config section ``average``: SFA, EMA, latest weights, Model Stock,
on each rank's own parts. ``copies`` holds copies of the parameters in their layout; ``formulas``
are the rules both sides share.
"""
