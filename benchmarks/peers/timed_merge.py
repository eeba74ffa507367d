"""One merge by llmtrain or mergekit in this process: ``timed_merge.py ours|mergekit ARGS...``.

ARGS are those of ``llmtrain merge`` or ``mergekit-yaml``. The last line that is printed holds
the wall and the CPU seconds from the end of the imports to the end of the merge.
"""

from __future__ import annotations

import sys
import time


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def ours(words: list[str]) -> tuple[float, float]:
    """``llmtrain merge``, with the process settings that the command makes: when it began."""
    from llmtrain.cli.process import prepare_process, this_is_the_command

    this_is_the_command()
    prepare_process()
    import llmtrain.merge.offline  # noqa: F401
    from llmtrain.cli.main import main

    begin = now()
    if main(["merge", *words]) != 0:
        raise SystemExit(1)
    return begin


def mergekit(words: list[str]) -> tuple[float, float]:
    """``mergekit-yaml``: when it began."""
    import mergekit.merge
    import mergekit.merge_methods  # noqa: F401
    from mergekit.scripts.run_yaml import main

    begin = now()
    main(words, standalone_mode=False)
    return begin


if __name__ == "__main__":
    began = {"ours": ours, "mergekit": mergekit}[sys.argv[1]](sys.argv[2:])
    print(*(end - begin for begin, end in zip(began, now(), strict=True)))
