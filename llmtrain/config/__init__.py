"""The run as a value: schema, loading, checking, durations.

``load_config(path, overrides)`` reads YAML files with ``base`` inheritance and dotted overrides
into one frozen ``RunConfig``; all faults are reported together with key, file and line.
"""
