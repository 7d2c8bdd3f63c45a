#!/usr/bin/env python3
"""Several processes on one machine, for run_train.sh: torch's launcher with its arguments, but with their exit status.

torchrun ends with status 1 and a page of tracebacks whatever ended the processes. After a user's mistake (status 2) they have said in one
line what is wrong; the status is passed on, and the line is repeated only if none of the ranks that LOG_RANK shows has said it.
"""

import os
import sys

from symbiotic_titan.process import MISTAKE, loading


def main() -> int:
    with loading():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        mistaken = [r for r, failure in error.failures.items() if failure.exitcode == MISTAKE]
        # Processes that were still running have been ended by the launcher, with a signal.
        if not mistaken or any(f.exitcode not in (MISTAKE, -15) for f in error.failures.values()):
            raise
        if not {str(rank) for rank in mistaken} & set(os.environ.get("LOG_RANK", "0").split(",")):
            told = error.failures[
                mistaken[0]
            ].message  # a table where the rank has left an error file
            message = told["message"] if isinstance(told, dict) else told
            line = f"error: rank {mistaken[0]}: {message.removeprefix('ValueError: ')}"
            print(line, file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
