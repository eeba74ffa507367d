"""``llmtrain reproduce``: the papers' claims in miniature, or as configs and jobs for GPUs.

An experiment (one file each) says which runs to make and which comparisons decide; ``experiment``
has the words for that, ``runner`` makes the runs and keeps their results, ``results`` computes
tables and verdicts, ``plot`` draws, ``jobs`` writes configs and SLURM scripts.
"""
