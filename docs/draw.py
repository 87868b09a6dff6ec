"""Write the tables of the pages and draw their pictures, from the results that lie beside them.

python docs/draw.py
"""

import re
from pathlib import Path

from reference_trainer.bench import results
from reference_trainer.bench.picture import draw
from reference_trainer.flops import step_flops
from reference_trainer.model import PRESETS, preset
from relora_core import layouts

DOCS = Path(__file__).parent
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def floors() -> str:
    """Return the table of operations of a whole step, by formula."""
    lines = ["| model | two paths | merged | dense |", "| --- | --- | --- | --- |"]
    for name in PRESETS:
        shape = preset(name, vocab_size=32_000)
        rank = min(128, shape.hidden_size // 4)
        batch = {"sequences": 64, "length": 1024, "rank": rank}
        full = step_flops("full rank", shape, **batch)
        shares = [
            f"{step_flops(form, shape, **batch) / full:.3f}"
            for form in ("two paths", "merged", "dense")
        ]
        lines.append(f"| {name}, rank {rank} | {' | '.join(shares)} |")
    return "\n".join(lines)


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
    lines = ["| model | matrix | fp32 | mixed |", "| --- | --- | --- | --- |"]
    for model, subject in order:
        both = (shares[model, subject].get(dtype, "") for dtype in ("fp32", "mixed"))
        lines.append(f"| {model} | {subject.removeprefix('linear ')} | {' | '.join(both)} |")
    return "\n".join(lines)


def optimizers() -> str:
    """Return the table of what a reset does to the state of each optimizer."""
    lines = [
        "| optimizer | pruned, the first one leads | also |",
        "| --- | --- | --- |",
    ]
    known = {
        f"{cls.__module__}.{cls.__qualname__}": layout for cls, layout in layouts.TORCH.items()
    }
    for path, layout in {**known, **layouts.FOREIGN}.items():
        also = [
            *(f"{key}: zeroed by a full reset only" for key in layout.factors),
            *(f"{key}: set to the parameter" for key in layout.copies),
            *(["no count of steps for each parameter"] if not layout.clock else []),
        ]
        lines.append(f"| {_short(path)} | {', '.join(layout.moments) or '-'} | {'; '.join(also)} |")
    for path, reason in layouts.REFUSED.items():
        lines.append(f"| {_short(path)} | refused | {reason} |")
    return "\n".join(lines)


def _short(path: str) -> str:
    package, name = path.split(".")[0], path.rpartition(".")[2]
    names = {
        "Optimizer1State": "Lion, SGD, RMSprop, Adagrad, LARS, in 8 or 32 bits",
        "Optimizer2State": "Adam, AdamW, LAMB, in 8 or 32 bits",
        "_AdamBase": "Adam, AdamW, in 8, 4 bits or fp8",
    }
    return f"{package}: {names.get(name, name)}"


TABLES = {"floors": floors, "merged": merged, "optimizers": optimizers}


def with_tables(page: str) -> str:
    """Return a page with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        source = match[2]
        table = TABLES[source]() if source in TABLES else results.table(results.read(DOCS / source))
        return f"{match[1]}{table}\n{match[3]}"

    return MARK.sub(fill, page)


def main() -> None:
    """Write every page's tables and draw the picture of the costs."""
    for page in DOCS.rglob("*.md"):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    blocks = [
        results.read(DOCS / f"results/cost/block-{dtype}.jsonl") for dtype in ("fp32", "bf16")
    ]
    draw(blocks, DOCS / "figures/cost.png")


if __name__ == "__main__":
    main()
