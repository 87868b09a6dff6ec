"""1.3B for real, on two processes of a CPU: warm start, restarts, a kill, a resume, an export.

    python docs/proof_1_3b.py

trains the tokenizer and the model on this Python's standard library, kills all processes with
SIGKILL in the second cycle, resumes, and loads the export with transformers. It takes 23 GB of
memory, 40 GB of disk and about an hour on two cores, and leaves its evidence in
docs/results/1.3b: log.txt, metrics.jsonl, config.yaml and loaded.json.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reference_trainer.data.index import read_index
from reference_trainer.data.windows import open_windows
from reference_trainer.environment import environment
from reference_trainer.logging.metrics import read

EVIDENCE = Path(__file__).parent / "results/1.3b"
KILLED_AT = 36  # after the first restart, and after a checkpoint
OPTIONS = {
    "steps": "64",
    "batch.sequences": "4",
    "batch.length": "128",
    "batch.micro": "2",
    "optim.lr": "4e-4",
    "optim.warmup": "4",
    "relora.warm_start": "16",
    "relora.rank": "128",
    "relora.every": "12",
    "relora.warmup": "3",
    "relora.lr_multiple": "2",
    "parallel.device": "cpu",
    "parallel.precision": "pure-bf16",
    "log.every": "1",
    "log.evaluate_every": "16",
    "log.evaluate_sequences": "16",
    "checkpoint.every": "24",
}


def train_tokenizer(file: Path, size: int) -> None:
    """Train a byte-level BPE on the standard library's sources."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [p.read_text("utf-8", "replace") for p in sources if "site-packages" not in p.parts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def launched(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start `train` on two processes, whose output goes to the log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "reference_trainer", "train", *arguments]
    with log.open("a") as file:
        file.write(f"$ {' '.join(['python', *command[1:]])}\n")
        file.flush()
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def killed(process: "subprocess.Popen[bytes]", metrics: Path, step: int, log: Path) -> None:
    """Kill every process of it with SIGKILL as soon as the step is on file."""
    while not (metrics.exists() and any(r["step"] >= step for r in read(metrics))):
        if process.poll() is not None:
            raise SystemExit(f"it ended before step {step}: see {log}")
        time.sleep(1)
    children = Path("/proc", str(process.pid), "task").glob("*/children")
    workers = [int(number) for file in children for number in file.read_text().split()]
    for number in (process.pid, *workers):  # the launcher first: it would tell of the others' end
        os.kill(number, signal.SIGKILL)
    process.wait()
    with log.open("a") as file:
        file.write(f"(step {step} is on file: killed {1 + len(workers)} processes with SIGKILL)\n")


def loaded(run: Path) -> dict[str, object]:
    """Return the loss of transformers' Llama on the run's held-out windows."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(run / "export", dtype=torch.float32).eval()
    data, length = run / "data", int(OPTIONS["batch.length"])
    held_out = open_windows(data, read_index(data), "held_out", length)
    count = int(OPTIONS["log.evaluate_sequences"])
    places = np.arange(count, dtype=np.uint64) * np.uint64(len(held_out)) // np.uint64(count)
    losses = []
    with torch.no_grad():
        for window in held_out.read(places).split(1):
            logits = model(window[:, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return {
        **environment(torch.device("cpu")),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": sum(losses) / len(losses),
    }


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="1.3b", help="a smaller one tries the script")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    run = Path("runs") / f"proof-{given.preset}"
    given.evidence.mkdir(parents=True, exist_ok=True)
    run.parent.mkdir(exist_ok=True)
    tokenizer = run.parent / f"{run.name}.tokenizer.json"
    options = {"name": run.name, "model.preset": given.preset, "data.tokenizer": str(tokenizer)}
    arguments = [part for k, v in {**options, **OPTIONS}.items() for part in (f"--{k}", v)]
    log = given.evidence / "log.txt"
    if run.exists():  # interrupted before
        arguments = ["--resume", "--name", run.name]
    else:
        train_tokenizer(tokenizer, given.vocab)
        log.write_text("")
    killed(launched(arguments, log), run / "metrics.jsonl", KILLED_AT, log)
    if launched(["--resume", "--name", run.name], log).wait():
        raise SystemExit(f"it did not end well: see {log}")
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(run / name, given.evidence / name)
    text = json.dumps(loaded(run), indent=2) + "\n"
    (given.evidence / "loaded.json").write_text(text)
    sys.stdout.write(log.read_text() + text)


if __name__ == "__main__":
    main()
