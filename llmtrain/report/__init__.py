"""The HTML report of runs: read a run's folder, draw, write one self-contained file.

``read_run`` reads what a run left behind, whole or broken off; ``render`` turns runs into one
HTML page without any network use; ``summary`` is the same in a few lines of text.
"""

from llmtrain.report.page import render
from llmtrain.report.read import Run, read_run, read_runs
from llmtrain.report.summary import summary

__all__ = ["Run", "read_run", "read_runs", "render", "summary"]
