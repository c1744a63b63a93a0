"""``conceptkit bench``: a command a suite, from what the suite says of itself."""

# Annotations are not postponed here: those of a suite's options are made while the program runs.
import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ..bench import Entry, Profile, suites
from .frame import app

bench = typer.Typer(no_args_is_help=True, help="Benchmarks on the demo model, whose concepts are known.")
app.add_typer(bench, name="bench")


ShardOption = Annotated[
    str, typer.Option(metavar="I/N", help="Measure one of N parts of everything, as on N machines whose --parts are put together later.")
]


def _add(name: str, entry: Entry) -> None:
    """The command ``conceptkit bench NAME``."""

    @bench.command(name, help=entry.about)
    def command(
        path: Annotated[Path, typer.Option("--json", help="The file of the rows; made or replaced.")],
        profile: Annotated[Profile, typer.Option(help="Minutes on two cores, or hours.")] = "quick",
        model: Annotated[str, typer.Option(help='"demo", or a checkpoint in its layout.')] = "demo",
        methods: Annotated[str, typer.Option(help=entry.methods)] = entry.listed,
        processes: Annotated[
            int | None, typer.Option(min=0, help="How many measure side by side, one thread each; by default one a core, at most 4.")
        ] = None,
        parts: Annotated[
            Path | None,
            typer.Option(help="The folder of single measurements, which a stopped run goes on from; by default beside the JSON."),
        ] = None,
        shard: ShardOption = "1/1",
        ship: Annotated[
            bool, typer.Option("--ship", help="Measure all baselines, whatever the limit, and store them with the package.")
        ] = False,
    ) -> None:
        from ..bench import frame

        suite = entry.make(profile, model, methods)
        folder = parts or path.with_suffix(".parts")
        count = min(os.cpu_count() or 1, 4) if processes is None else processes
        asked = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
        if asked is None or int(asked[1]) > int(asked[2]):
            raise ValueError(f"{shard!r} is no part of a whole: write 2/4 for the second of four")
        report = frame.run(suite, folder, processes=count, say=typer.echo, shard=(int(asked[1]) - 1, int(asked[2])), whole=ship)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
        typer.echo(frame.summary(report))
        typer.echo(f"rows in {path}; single measurements in {folder}")
        if ship:
            typer.echo(f"{frame.ship(suite, folder)} baseline measurements are stored with the package")


for _name, _entry in suites().items():
    _add(_name, _entry)
