"""Write the tables of the pages and draw their pictures, from the results that lie beside them.

python docs/draw.py
"""

import re
from pathlib import Path

from reference_trainer.bench import results
from reference_trainer.bench.picture import draw
from reference_trainer.flops import step_flops
from reference_trainer.model import PRESETS, preset

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


TABLES = {"floors": floors, "merged": merged}


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
