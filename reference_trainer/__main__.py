"""`python -m reference_trainer`: the program, and Ctrl-C before it has been imported."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable


def _leave(*_: object) -> None:
    os.write(2, b"interrupted before anything had begun\n")
    os._exit(130)  # an import that is interrupted raises whatever it likes


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    faulthandler.enable()  # a crash inside of torch or of a kernel tells the line that led there
    from reference_trainer.main import load, main

    program: Callable[[], int | None] = main
    load(*sys.argv[1:])
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        program = record(main)  # torchrun reports the traceback of the process that failed first
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = program()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would only garble the end
    sys.exit(code)
