"""Several processes with one error: who says it.

Under torchrun the agent keeps a key-value store that outlives the workers. A process that fails
looks there whether another one has said the same sentence; nobody waits for a process that may
never fail, so an error of one rank alone is said as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from datetime import timedelta

# How long the first rank is given to say it before another one does, and for the store to answer.
PATIENCE = 3.0
_CONNECT = timedelta(seconds=5)


def said_elsewhere(sentence: str) -> bool:
    """Whether another process of this run has said ``sentence``, so that this one need not.

    False also where there is no store to ask: then each process speaks for itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        from torch._C._distributed_c10d import TCPStore

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=_CONNECT, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        key = f"llmtrain/said/{attempt}/{hashlib.sha256(sentence.encode()).hexdigest()}"
        end = time.monotonic() + (PATIENCE if os.environ.get("RANK", "0") != "0" else 0.0)
        while time.monotonic() < end:
            if store.check([key]):
                return True
            time.sleep(0.02)
        return int(store.add(key, 1)) > 1
    except (ImportError, KeyError, ValueError, RuntimeError):
        return False
