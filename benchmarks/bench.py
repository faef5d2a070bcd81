"""Times this package against the plain ways to do the same; docs/performance.md explains the table.

    python benchmarks/bench.py [--device cuda] [--only NAME ...] [--output FILE] [--short]

The two of a pair run alternately in one process; on a CPU with one thread, timed by the processor time they use, so
that other programs on the machine do not count. Printed and written as JSON: the median time of each, and the median
of the ratios of neighbouring runs.
"""

import argparse
import json
import platform
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from comparisons import COMPARISONS
from pairs import Bench, Row


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, by name."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "diffusers", "ctrl-csc-hf")},
    }


def as_table(rows: list[Row]) -> str:
    lines = ["| comparison | setting | ours, ms | rival, ms | ratio | goal | difference | also |", "|" + " --- |" * 8]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.3g} {'reached' if row.ratio >= row.goal else 'missed'}"
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
        times = f"{row.ours_s * 1e3:.2f} | {row.rival_s * 1e3:.2f} | {row.ratio:.2f}"
        lines.append(f"| {row.comparison} | {row.setting} | {times} | {goal} | {difference} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--short", action="store_true", help="tiny sizes: tests the command, times mean nothing")
    options = parser.parse_args(arguments)
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(options.device, repeats=2 if options.short else 9, short=options.short)
    described = machine(options.device)  # before the minutes of measuring, in case it cannot
    rows: list[Row] = []
    for name in options.only:
        torch.manual_seed(0)
        rows += COMPARISONS[name](bench)
    results = {"machine": described, "repeats": bench.repeats, "rows": [asdict(row) for row in rows]}
    print(as_table(rows))
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
