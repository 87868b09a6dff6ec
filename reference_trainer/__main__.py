"""`python -m reference_trainer`: the commands, and Ctrl-C before they have been imported."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    os.write(2, b"interrupted before anything had begun\n")
    os._exit(130)  # an import that is interrupted raises whatever it likes


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    from torch.distributed.elastic.multiprocessing.errors import record

    from reference_trainer.commands import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = record(main)()  # torchrun reports the traceback of the process that failed first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would only garble the end
    sys.exit(code)
