"""llmtrain: distributed pretraining of language models from one YAML file.

Importing this package imports neither torch nor any optional dependency.
"""

__version__ = "0.1.0"
