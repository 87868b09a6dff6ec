"""Write the tables of the pages and draw their pictures, from the results that lie beside them.

python docs/draw.py
"""

import json
import re
import runpy
import shutil
import subprocess
from collections import Counter
from contextlib import chdir, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study import tables
from study.picture import draw as draw_study
from study.records import read as read_trials
from study.tables import Record

from reference_trainer.bench import markdown, results
from reference_trainer.bench.computation import of_micro_steps
from reference_trainer.bench.estimate.command import KEPT_FREE, advice, table
from reference_trainer.bench.estimate.gpus import GPUS
from reference_trainer.bench.estimate.row import Row
from reference_trainer.bench.picture import draw
from reference_trainer.bench.projection import CLUSTERS, communication_seconds
from reference_trainer.files import replaced
from reference_trainer.flops import step_flops
from reference_trainer.logging.metrics import read
from reference_trainer.main import parser
from reference_trainer.model.llama import PRESETS, Llama, preset
from reference_trainer.options import leaves
from reference_trainer.report.page import page
from reference_trainer.report.picture import draw as draw_run
from reference_trainer.report.recorded import open_run
from relora_core.optim import state_layouts

DOCS = Path(__file__).parent
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def floors() -> str:
    """Return the table of operations of a whole step, by formula."""
    rows = []
    for name in PRESETS:
        shape = preset(name, vocab_size=32_000)
        rank = min(128, shape.hidden_size // 4)
        batch = {"sequences": 64, "length": 1024, "rank": rank}
        full = step_flops("full rank", shape, **batch)
        shares = [
            f"{step_flops(form, shape, **batch) / full:.3f}"
            for form in ("two paths", "merged", "dense")
        ]
        rows.append([f"{name}, rank {rank}", *shares])
    return markdown.table(["model", "two paths", "merged", "dense"], rows)


def merged() -> str:
    """Return the table of what the merged form takes of the time of two paths."""
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for file in sorted(DOCS.glob("results/cost/linear-*.jsonl")):
        first, *_ = records = results.read(file)
        for subject, arms in results.by_subject(records):
            seconds = {arm["arm"]: arm["backward_seconds"] for arm in arms}
            share = results.ratio(seconds["merged"], seconds["two-paths"])
            assert share is not None
            shown = f"{share.median:.2f} ({share.low:.2f} to {share.high:.2f})"
            shares.setdefault((first["model"], subject), {})[first["dtype"]] = shown
    order = sorted(shares, key=lambda row: list(PRESETS).index(row[0]))
    rows = []
    for model, subject in order:
        both = (shares[model, subject].get(dtype, "") for dtype in ("fp32", "mixed"))
        rows.append([model, subject.removeprefix("linear "), *both])
    return markdown.table(["model", "matrix", "fp32", "mixed"], rows)


def promises() -> str:
    """Return the table of what the kit's deep run looked at."""
    file = DOCS / "results" / "testing" / "promises.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    checks: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for record in records:
        if "promise" in record:
            checks.setdefault(record["promise"], []).append(record["battery"])
            counts[record["promise"]] += record["examples"]
    rows = [[name, ", ".join(over), f"{counts[name]:,}"] for name, over in checks.items()]
    rows.append(["", "in all", f"{records[-1]['examples']:,}"])
    return markdown.table(["property", "over", "examples"], rows)


def optimizers() -> str:
    """Return the table of what a reset does to the state of each optimizer."""
    rows = []
    torchs = state_layouts.TORCH.items()
    known = {f"{cls.__module__}.{cls.__qualname__}": layout for cls, layout in torchs}
    for path, layout in {**known, **state_layouts.FOREIGN}.items():
        also = [
            *(f"{key}: zeroed by a full reset only" for key in layout.shared),
            *(f"{key}: set to the parameter" for key in layout.copies),
            *(["no count of steps for each parameter"] if not layout.clock else []),
        ]
        rows.append([_short(path), ", ".join(layout.moments) or "-", "; ".join(also)])
    for path, reason in state_layouts.REFUSED.items():
        rows.append([_short(path), "refused", reason])
    return markdown.table(["optimizer", "pruned, the first one leads", "also"], rows)


def projection() -> str:
    """Return the table of modelled step times, of every cluster, layout and number of GPUs."""
    sequences, most = 1024, 16  # of a step, and at once on a GPU
    counts = (8, 64, 1024)
    blocks = []
    for cluster in CLUSTERS:
        rows: dict[str, dict[int, str]] = {}
        for count in counts:
            first, *found = results.read(DOCS / f"results/scaling/traffic-1.3b-{count}.jsonl")
            at_once = first["tokens"] // first["length"]
            micro_steps = sequences // count // at_once
            assert at_once == min(most, sequences // count)
            times = {}
            for r in found:
                times[r["arm"]] = (
                    of_micro_steps(r["computed"][cluster.gpu], micro_steps),
                    communication_seconds(
                        r["step"], r["micro_step"], cluster, micro_steps=micro_steps
                    ),
                )
            full = [both for arm, both in times.items() if arm.startswith("full rank")]
            hidden, exposed = min(map(max, full)), min(map(sum, full))
            for arm, both in times.items():
                low, high = sorted((max(both) / hidden, sum(both) / exposed))
                shown = f"{both[0] * 1e3:,.0f} + {both[1] * 1e3:,.0f} ms ({low:.2f} to {high:.2f})"
                rows.setdefault(arm, {})[count] = shown
        header = [cluster.name, *(f"{count:,} GPUs" for count in counts)]
        order = sorted(rows, key=lambda arm: ("full" not in arm, "shard" not in arm.split(",")[0]))
        lines = [[arm, *(rows[arm].get(count, "") for count in counts)] for arm in order]
        blocks.append(markdown.table(header, lines))
    return "\n\n".join(blocks)


def roofline_arms() -> str:
    """Return the table of ratios by the roofline, of every arm and layout."""
    rows: dict[str, dict[str, str]] = {}
    for layout in ("shard", "replicate", "replicate-bf16"):
        _, *records = results.read(DOCS / f"results/roofline/1.3b-h100-{layout}-8.jsonl")
        for record in records:
            if record["event"] == "arm" and (layout == "shard" or record["arm"] == "ours"):
                arm = record["arm"] if record["arm"] != "ours" else f"ours, {layout}"
                rows.setdefault(arm, {})[record["subject"]] = f"{record['ratio']:.3f}"
    subjects = list(next(iter(rows.values())))
    lines = [[arm, *(found[subject] for subject in subjects)] for arm, found in rows.items()]
    return markdown.table(["arm", *subjects], lines)


def roofline_steps() -> str:
    """Return the table of whole steps by the roofline, by size, GPU and batch."""
    layouts = ("shard", "replicate", "replicate-bf16")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for file in sorted((DOCS / "results/roofline").glob("*.jsonl")):
        first, *records = results.read(file)
        batch = f"{first['accumulate']} x {first['micro']}"
        (own,) = (
            record
            for record in records
            if record["event"] == "arm"
            and (record["subject"], record["arm"]) == ("whole step", "ours")
        )
        shown = f"{own['ratio']:.3f} ({own['seconds'] * 1e3:,.0f} ms)"
        rows.setdefault((first["model"], first["gpu"], batch), {})[first["layout"]] = shown
    lines = [[*key, *(found.get(name, "") for name in layouts)] for key, found in rows.items()]
    return markdown.table(["model", "GPU", "sequences", *layouts], lines)


def traffic(picture: Path) -> None:
    """Draw what a process sends in a step, by collective, as shares of full rank."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2, sharex=True), ("1.3b", "130m"), strict=True):
        _, *records = results.read(DOCS / f"results/scaling/traffic-{name}-4.jsonl")
        full = results.total(records[0]["step"])
        colours = {"all-gather": "#9ecae1", "reduce-scatter": "#fdae6b", "all-reduce": "#d94801"}
        for kind, colour in colours.items():
            before = list(colours)[: list(colours).index(kind)]
            left = [sum(results.total(r["step"], k) for k in before) / full for r in records]
            width = [results.total(r["step"], kind) / full for r in records]
            axes.barh([r["arm"] for r in records], width, left=left, color=colour, label=kind)
        for row, record in enumerate(records):
            share = results.total(record["step"]) / full
            axes.text(share + 0.01, row, f"{share:.2f}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15)
        axes.set_title(f"{name}: {full / 1e9:.2f} GB a step in full rank", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_yticks([])
    figure.supxlabel("bytes that a process sends in a step, 4 processes, rank 128", fontsize=8)
    with replaced(picture) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")


def _short(path: str) -> str:
    package, name = path.split(".")[0], path.rpartition(".")[2]
    names = {
        "Optimizer1State": "Lion, SGD, RMSprop, Adagrad, LARS, in 8 or 32 bits",
        "Optimizer2State": "Adam, AdamW, LAMB, in 8 or 32 bits",
        "_AdamBase": "Adam, AdamW, in 8, 4 bits or fp8",
    }
    return f"{package}: {names.get(name, name)}"


def estimates() -> str:
    """Return the tables of `estimate`, of a file each."""
    blocks = []
    for file in sorted(DOCS.glob("results/estimate/estimate-*.jsonl")):
        first, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        known = [f"{first['model']}, {first['world_size']} x {first['gpu']}"]
        known += [f"{key} {first[key]}" for key in ("sequences", "length", "rank")]
        known += [first["precision"], first["optimizer"], f"torch {first['torch']}"]
        found = [Row(**{k: v for k, v in row.items() if k != "event"}) for row in rows]
        said = advice(found, (1 - KEPT_FREE) * GPUS[first["gpu"]][0])
        blocks += [", ".join(known), table(found), "\n".join(said)]
    return "\n\n".join(blocks)


def proof() -> str:
    """Return the table of the 1.3B run on a CPU."""
    directory = DOCS / "results/1.3b"
    records = read(directory / "metrics.jsonl")
    loaded = json.loads((directory / "loaded.json").read_text(encoding="utf-8"))
    evaluations = {(r["step"], r["phase"]): r for r in records if r["event"] == "evaluation"}
    steps = [r for r in records if r["event"] == "step"]
    ranks = [(r.get("restart") or r["cycles"], r["ranks"]) for r in records if r.get("ranks")]
    start = records[0]
    where = (
        f"{start['device']}, {start['processes']} processes of {start['threads']} thread, "
        f"torch {start['torch']}, seed {start['seed']}, {start['date'][:10]}"
    )
    rows = [
        [f"held-out loss at step {step}, {phase}", f"{record['held_out_loss']:.4f}"]
        for (step, phase), record in evaluations.items()
    ]
    exported = f"{loaded['class']} ({loaded['parameters']:,} parameters)"
    rows.append(
        [f"the same of the export in transformers' {exported}", f"{loaded['held_out_loss']:.4f}"]
    )
    for phase in ("warm-start", "relora"):
        peak = max(r["peak_memory"] for r in steps if r["phase"] == phase)
        rows.append([f"peak memory of a process, {phase}", f"{peak / 2**30:.1f} GiB"])
    for cycles, found in ranks:
        shown = ", ".join(f"{name.removeprefix('model.layers.')} {r}" for name, r in found.items())
        bound = start["rank"] * cycles
        rows.append([f"rank of the update, cycle {cycles} (bound {bound})", shown])
    return f"{where}\n\n{markdown.table(['', ''], rows)}"


def study(kind: str) -> str:
    """Return the tables of one kind, of every size whose trials are on file."""
    blocks = []
    for size, records in trials().items():
        names = list(tables.by_arm(records))
        swept = [name for name in names if name.startswith("ReLoRA, ") or " of rank " in name]
        ablated = [name for name in names if name.startswith("LoRA, ")]
        shown = {
            "arms": ["LoRA", tables.FULL, tables.LORA, tables.RELORA],
            "ablation": ["LoRA", *ablated, tables.RELORA] if ablated else [],
            "sweeps": [tables.LORA, tables.RELORA, *swept] if swept else [],
        }
        if kind == "rates":
            found = tables.rates(records)
        elif kind == "spectra":
            found = tables.spectra(records)
        else:
            found = tables.outcomes(records, shown[kind], step_time(size))
        if found.count("\n") > 1:  # more than a header
            blocks += [f"**{size}**", found]
    return "\n\n".join(blocks)


def trials() -> dict[str, list[Record]]:
    """Return the study's records by size."""
    files = sorted(DOCS.glob("results/study/[0-9]*.jsonl"))
    return {file.stem: read_trials(file) for file in files}


def step_time(size: str) -> float:
    """Return the median time of a compiled step with low-rank sites, of one in full rank."""
    measured = results.read(DOCS / f"results/study/step-{size}.jsonl")
    seconds = {r["arm"]: r["step_seconds"] for r in measured if r["event"] == "arm"}
    ratio = results.ratio(seconds["ours-compiled"], seconds["full-compiled"])
    assert ratio is not None
    return ratio.median


def compared() -> str:
    """Return README's table: time and memory of a block of 1.3b."""
    arms = ("ours", "full", "peft", "plain")
    rows = []
    for dtype in ("fp32", "bf16"):
        measured = results.read(DOCS / f"results/cost/block-{dtype}.jsonl")
        found = {r["arm"]: r for r in measured if r["event"] == "arm"}
        times = [
            results.ratio(found[a]["step_seconds"], found["full"]["step_seconds"]) for a in arms
        ]
        shown = [f"{time.median:.2f}" for time in times if time is not None]
        peaks = [found[arm]["peak_bytes"] / found["full"]["peak_bytes"] for arm in arms]
        rows.append([f"time of a step, {dtype}", *shown])
        rows.append([f"peak memory, {dtype}", *(f"{peak:.2f}" for peak in peaks)])
    header = ["", "this library", "full rank", "PEFT's LoRA", "the linear of the paper's code"]
    return markdown.table(header, rows)


def commands() -> str:
    """Return the table of the trainer's commands, from its parser."""
    (action,) = parser()._subparsers._group_actions
    rows = [[f"`{choice.dest}`", choice.help] for choice in action._choices_actions]
    return markdown.table(["command", ""], rows)


def run_options() -> str:
    """Return the tables of a run's options, one for each section."""
    sections: dict[str, list[list[str]]] = {}
    for path, field in leaves():
        section, _, _ = path.rpartition(".")
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["help"].replace("|", "\\|")
        value = "" if default is None or default == () else f"`{shown}`"
        sections.setdefault(section, []).append([f"`{path}`", value, text])
    return "\n\n".join(
        (f"### {name}\n\n" if name else "") + markdown.table(["option", "default", ""], rows)
        for name, rows in sections.items()
    )


def draw_tutorial(picture: Path) -> None:
    """Run the tutorial's blocks and keep the picture that the last one draws."""
    text = (DOCS / "tutorial/first-restart.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    with TemporaryDirectory() as directory, chdir(directory), redirect_stdout(None):
        exec(compile(code, "first-restart.md", "exec"), {"__name__": "__main__"})
        picture.write_bytes(Path(picture.name).read_bytes())


def screenshot(picture: Path) -> None:
    """Draw the page of the first run as a browser shows it; leave the picture without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"{picture} stays as it is: there is no Chromium to draw it")  # noqa: T201 - a script
        return
    with TemporaryDirectory() as directory:
        html, png = Path(directory) / "page.html", Path(directory) / "page.png"
        html.write_text(page([open_run(DOCS / "results/first-run")], made="", refresh=None))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        where = [f"--user-data-dir={directory}/profile", f"--screenshot={png}", html.as_uri()]
        subprocess.run(
            [browser, *flags, "--window-size=1100,1650", *where], check=True, capture_output=True
        )
        picture.write_bytes(png.read_bytes())


def presets() -> str:
    """Return the table of shapes, with the parameters that they have over two vocabularies."""
    header = ["preset", "width", "of the MLP", "blocks", "heads"]
    rows = []
    for name, sizes in PRESETS.items():
        with torch.device("meta"):
            both = [Llama(preset(name, vocab_size=ids)) for ids in (256, 32_000)]
        shown = (f"{sum(p.numel() for p in m.parameters()) / 1e6:,.1f}M" for m in both)
        rows.append([f"`{name}`", *map(str, sizes), *shown])
    return markdown.table([*header, "parameters, of bytes", "of 32,000 ids"], rows)


def architectures() -> str:
    """Return the table of what became sites in architectures of transformers."""
    file = DOCS / "results" / "architectures" / "architectures.jsonl"
    _, *records = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    table: str = runpy.run_path(str(DOCS / "architectures.py"))["table"](records)
    return table


TABLES = {
    "architectures": architectures,
    "commands": commands,
    "presets": presets,
    "compared": compared,
    "options": run_options,
    **{
        f"study-{kind}": partial(study, kind)
        for kind in ("rates", "arms", "ablation", "sweeps", "spectra")
    },
    "estimates": estimates,
    "floors": floors,
    "proof": proof,
    "merged": merged,
    "optimizers": optimizers,
    "projection": projection,
    "promises": promises,
    "roofline-arms": roofline_arms,
    "roofline-steps": roofline_steps,
}


def with_tables(text: str) -> str:
    """Return a page with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        source = match[2]
        table = TABLES[source]() if source in TABLES else results.table(results.read(DOCS / source))
        return f"{match[1]}{table}\n{match[3]}"

    return MARK.sub(fill, text)


def main() -> None:
    """Write every page's tables and draw the pictures."""
    for file in (*DOCS.rglob("*.md"), DOCS.parent / "README.md"):
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
    blocks = [
        results.read(DOCS / f"results/cost/block-{dtype}.jsonl") for dtype in ("fp32", "bf16")
    ]
    draw(blocks, DOCS / "figures/cost.png")
    traffic(DOCS / "figures/traffic.png")
    draw_run(open_run(DOCS / "results/first-run"), DOCS / "figures/first-run.png")
    screenshot(DOCS / "figures/report.png")
    draw_tutorial(DOCS / "figures/first-restart.png")
    draw_study(list(trials().values()), DOCS / "figures/study.png")


if __name__ == "__main__":
    main()
