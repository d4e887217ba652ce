"""Put trainings of pretrain.py side by side that were run apart: one table, one plot, one JSON file.

    python examples/compare_runs.py --runs exact=runs/a paper=runs/b ours=runs/c --output results/gpt-30m-16k

writes results/gpt-30m-16k.json and .png and prints the table. They must differ in the attention alone.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command_line import UsageError, make_parser, option, parse
from pretrain_report import Result, compare, comparison_text, plot_losses
from records import read_json, write_json


@dataclass
class CompareArguments:
    output: str = option("comparison", "Where to write, without the ending .json or .png.")
    runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of runs, result.json files, or files that this script has written; NAME=PATH "
            "gives the only training in it another name than its attention."
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    try:
        (arguments,) = parse(make_parser((CompareArguments,), "compare_runs.py", __doc__), argv)
        results = read_results(arguments.runs)
        output = Path(arguments.output)
        comparison = compare(results, output.name + ".png")
    except UsageError as error:
        print(f"\ncompare_runs.py: error: {error}", file=sys.stderr)
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_name(output.name + ".json"), comparison)
    plot_losses(results, output.with_name(output.name + ".png"))
    print(comparison_text(comparison, output.parent))
    return 0


def read_results(runs: Sequence[str]) -> dict[str, Result]:
    """All trainings by name, in the order in which they are given."""
    results: dict[str, Result] = {}
    for run in runs:
        name, separator, path = run.rpartition("=")
        found = results_in(Path(path))
        if separator and len(found) > 1:
            raise UsageError(f"{path!r} holds {len(found)} trainings, which cannot all be called {name!r}.")
        for attention, result in found.items():
            if (key := name or attention) in results:
                raise UsageError(
                    f"two trainings are called {key!r}: give one of them another name, NAME=PATH."
                )
            results[key] = result
    if not results:
        raise UsageError("name at least one run.")
    return results


def results_in(path: Path) -> dict[str, Result]:
    """The trainings in a run's folder, in a training's, in its result.json, or in a comparison."""
    paths = sorted([*path.glob("result.json"), *path.glob("*/result.json")]) if path.is_dir() else [path]
    found: dict[str, Result] = {}
    for file in paths:
        try:
            content = read_json(file)
            found |= content["results"] if "results" in content else {content["attention"]: content}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{str(file)!r} is no result of a training.") from error
    if not found:
        raise UsageError(f"there is no finished training in {str(path)!r}.")
    return found


if __name__ == "__main__":
    sys.exit(main())
