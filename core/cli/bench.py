"""``conceptkit bench``: the suites, each a command."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..phrases import parse_list
from .frame import app

if TYPE_CHECKING:
    from ..bench.frame import Suite

bench = typer.Typer(no_args_is_help=True, help="Benchmarks on the demo model, whose concepts are known.")
app.add_typer(bench, name="bench")

DemoOption = Annotated[str, typer.Option("--model", help='"demo", or a checkpoint in its layout.')]
JsonOption = Annotated[Path, typer.Option("--json", help="The file of the rows; made or replaced.")]
ProfileOption = Annotated[Literal["quick", "full"], typer.Option(help="Minutes on two cores, or hours.")]
ProcessesOption = Annotated[
    int | None, typer.Option(min=0, help="How many measure side by side, one thread each; by default one a core, at most 4.")
]
PartsOption = Annotated[
    Path | None, typer.Option(help="The folder of single measurements, which a stopped run goes on from; by default beside the JSON.")
]
ShardOption = Annotated[
    str, typer.Option(metavar="I/N", help="Measure one of N parts of everything, as on N machines whose --parts are put together later.")
]
ShipOption = Annotated[bool, typer.Option("--ship", help="Measure all baselines, whatever the limit, and store them with the package.")]


@bench.command("decompose")
def bench_decompose(
    json_: JsonOption,
    profile: ProfileOption = "quick",
    model: DemoOption = "demo",
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas; docs/bench.md names those of the ablation.")] = (
        "distilled,text,conceptor,conceptor-tuned"
    ),
    processes: ProcessesOption = None,
    parts: PartsOption = None,
    shard: ShardOption = "1/1",
    ship: ShipOption = False,
) -> None:
    """Measure decompositions where the answer is known: planted mixtures, and the composite words of the demo's worlds."""
    from ..bench.decompose import ABLATIONS, METHODS, DecomposeSuite
    from ..hosts.diffusers import DEMO, DEMOS

    second = "demo-second" if (DEMO / DEMOS["demo-second"]).is_file() else None
    _bench(DecomposeSuite(profile, model, second, _among((*METHODS, *ABLATIONS), methods)), json_, parts, processes, ship, shard)


@bench.command("edit")
def bench_edit(
    json_: JsonOption,
    profile: ProfileOption = "quick",
    model: DemoOption = "demo",
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas; by default those of the profile.")] = "",
    processes: ProcessesOption = None,
    parts: PartsOption = None,
    shard: ShardOption = "1/1",
    ship: ShipOption = False,
) -> None:
    """Measure edits where the answer is known: concepts of the demo model before and after, attacks on them, and speed at real sizes."""
    from ..bench.edit import EditSuite
    from ..edit import METHODS

    erasing = [name for name, preset in METHODS.items() if not preset.balances]
    _bench(EditSuite(profile, model, _among(erasing, methods)), json_, parts, processes, ship, shard)


def _among(known: Sequence[str], asked: str) -> tuple[str, ...]:
    """The methods of a list separated by commas. Raises ValueError for one that the benchmark does not know."""
    chosen = parse_list(asked)
    if not set(chosen) <= set(known):
        raise ValueError(f"there is no method {', '.join(sorted(set(chosen) - set(known)))}: choose from {', '.join(known)}")
    return chosen


def _bench(suite: Suite, path: Path, parts: Path | None, processes: int | None, ship: bool, shard: str = "1/1") -> None:
    """Run a suite, write its JSON, and say which bars are met."""
    from ..bench import frame

    parts = parts or path.with_suffix(".parts")
    count = min(os.cpu_count() or 1, 4) if processes is None else processes
    asked = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if asked is None or int(asked[1]) > int(asked[2]):
        raise ValueError(f"{shard!r} is no part of a whole: write 2/4 for the second of four")
    report = frame.run(suite, parts, processes=count, say=typer.echo, shard=(int(asked[1]) - 1, int(asked[2])), whole=ship)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
    typer.echo(frame.summary(report))
    typer.echo(f"rows in {path}; single measurements in {parts}")
    if ship:
        typer.echo(f"{frame.ship(suite, parts)} baseline measurements are stored with the package")
