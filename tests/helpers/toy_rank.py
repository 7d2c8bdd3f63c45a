"""A rank of tools/launch.py that ends as it is told to, without torch: ``python -m tests.helpers.toy_rank FATE ...``.

``FATE`` is what becomes of rank 0, 1, ... in every attempt, or ``FIRST,SECOND`` in the first and in the others: an exit status, ``wait``,
``kill`` or ``store`` (leave a key in the run's store and crash; in the second attempt it must not be there).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def fail(status: int) -> None:
    """End as symbiotic_titan.train does: with the error in a file for the launcher, and in the output."""
    trace = "Traceback (most recent call last):\n  in the middle of rank\nValueError: broken"
    told = {"message": "ValueError: broken", "extraInfo": {"timestamp": "1", "py_callstack": trace}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": told}))
    print("broken" if status > 1 else trace, file=sys.stderr, flush=True)
    os._exit(status)


def leave_a_key(attempt: int) -> int:
    """The exit status: that of a crash in the first attempt, in the second one 0 where it has another store."""
    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    count = TCPStore(*address, is_master=False).add("attempts", 1)
    return 1 if attempt == 0 else 5 * (count - 1)


def main(fates: list[str]) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    own = fates[int(os.environ["RANK"])].split(",")
    fate = own[min(attempt, len(own) - 1)]
    print(f"attempt {attempt}", file=sys.stderr, flush=True)
    if fate == "wait":
        time.sleep(60)
    elif fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "store":
        os._exit(leave_a_key(attempt))
    elif fate != "0":
        fail(int(fate))


if __name__ == "__main__":
    main(sys.argv[1:])
