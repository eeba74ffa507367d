"""One merge by llmtrain or mergekit in this process: ``timed_merge.py ours|mergekit ARGS...``.

ARGS are those of ``llmtrain merge`` or ``mergekit-yaml``. The last line that is printed is the
seconds from the end of the imports to the end of the merge.
"""

from __future__ import annotations

import sys
import time


def ours(words: list[str]) -> float:
    """``llmtrain merge``, with the process settings that the command makes."""
    from llmtrain.cli.process import prepare_process, this_is_the_command

    this_is_the_command()
    prepare_process()
    import llmtrain.merge.offline
    import llmtrain.merge.search  # noqa: F401
    from llmtrain.cli.main import main

    begin = time.perf_counter()
    if main(["merge", *words]) != 0:
        raise SystemExit(1)
    return time.perf_counter() - begin


def mergekit(words: list[str]) -> float:
    """``mergekit-yaml``."""
    import mergekit.merge
    import mergekit.merge_methods  # noqa: F401
    from mergekit.scripts.run_yaml import main

    begin = time.perf_counter()
    main(words, standalone_mode=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    print({"ours": ours, "mergekit": mergekit}[sys.argv[1]](sys.argv[2:]))
