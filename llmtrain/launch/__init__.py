"""Runs on clusters: the SLURM job that trains and goes on, and the health check of its nodes.

``train.sbatch`` is the job, ``slurm`` fills it in and submits it, ``health`` is what
``llmtrain doctor --health`` checks.
"""

from llmtrain.launch.health import NodeReport, check_node, measure_all_reduce
from llmtrain.launch.slurm import SlurmJob, prepare_job, status, submit

__all__ = [
    "NodeReport",
    "SlurmJob",
    "check_node",
    "measure_all_reduce",
    "prepare_job",
    "status",
    "submit",
]
