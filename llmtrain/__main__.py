"""``python -m llmtrain``."""

from llmtrain.cli.main import entry

entry()
