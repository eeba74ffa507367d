"""The command line: one short file per subcommand, parsing and printing, no logic.

A subcommand's module has ``HELP``, ``add_arguments(parser)`` and ``run(args) -> exit code``; it
is imported when it is used and imports what is heavy inside ``run``.
"""
