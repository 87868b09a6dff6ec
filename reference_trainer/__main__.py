"""`python -m reference_trainer`: the program, and Ctrl-C before it has been imported."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable


def _leave(*_: object) -> None:
    os.write(2, b"interrupted before anything had begun\n")
    os._exit(130)  # not an exception: an interrupted import may turn it into any other


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    faulthandler.enable()  # a crash inside torch or a kernel shows the Python line that led there
    from reference_trainer.main import load, main

    program: Callable[[], int | None] = main
    load(*sys.argv[1:])
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        program = record(main)  # torchrun reports the traceback of the process that failed first
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = program()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only garble the exit
    sys.exit(code)
