"""The quantization laboratory's commands: ``calibrate-compare`` and ``sensitivity``.

In: arguments. Out: tables, a page or JSON, progress on standard error. Heavy imports
wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.build.arguments import (
    CALIBRATOR_NAMES,
    CacheOption,
    CalibrationDataOption,
    CalibrationLimitOption,
    CheckpointOption,
    DataOption,
    GateOption,
    JsonOption,
    RevisionOption,
    load_recipe_argument,
    make_sources,
    parse_calibrator_argument,
)


def add_laboratory_commands(app: typer.Typer) -> None:
    """Register the laboratory's commands with ``app``."""
    app.command()(calibrate_compare)
    app.command()(sensitivity)


def calibrate_compare(
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    data: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = None,
    calibration_data: CalibrationDataOption = None,
    calibration_limit: CalibrationLimitOption = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, gemms, full or a YAML file; repeat for several.  [default: "
            "these three]",
            show_default=False,
        ),
    ] = None,
    calibrator: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{CALIBRATOR_NAMES}; repeat for several.  [default: max, four "
            "percentiles, mse, entropy and search]",
            show_default=False,
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option(
            help="Also with SmoothQuant, by percentile-99.999 and search, as far as "
            "--calibrator names them."
        ),
    ] = True,
    sensitivity_questions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Questions for the sensitivity of the last recipe; 0 leaves it out.",
        ),
    ] = 100,
    gate: GateOption = 0.99,
    html: Annotated[
        Path, typer.Option(help="The report, one file that needs no network.")
    ] = Path("int8qa-calibrators.html"),
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every calibrator with every recipe: F1, agreement, latency, size; table and page.

    One calibration pass serves all. On two cores the default takes half an hour and
    more for 1,000 questions.
    """
    from int8qa.build.comparison.page import write_page
    from int8qa.build.laboratory import compare_calibrators
    from int8qa.build.options import LaboratoryOptions
    from int8qa.build.report import show_comparison
    from int8qa.errors import RepositoryError

    if not html.absolute().parent.is_dir():
        raise RepositoryError(
            f"no such directory for the report: {html.absolute().parent}"
        )
    chosen: dict[str, Any] = {}
    if checkpoint is not None:
        chosen["checkpoint"] = checkpoint
    if recipe:
        chosen["recipes"] = tuple(load_recipe_argument(name) for name in recipe)
    if calibrator:
        chosen["calibrators"] = tuple(
            parse_calibrator_argument(name) for name in calibrator
        )
    result = compare_calibrators(
        LaboratoryOptions(
            revision=revision,
            sources=make_sources(calibration_data, data, calibration_limit, limit),
            smooth=smooth,
            gate=gate,
            sensitivity_questions=sensitivity_questions,
            cache=cache,
            **chosen,
        )
    )
    write_page(result, html)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_comparison(result)
    print(f"report: {html}", file=sys.stderr, flush=True)


def sensitivity(
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    data: DataOption = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = 200,
    calibration_data: CalibrationDataOption = None,
    calibration_limit: CalibrationLimitOption = None,
    recipe: Annotated[
        str, typer.Option(help="linear, gemms, full or a YAML file.")
    ] = "full",
    calibrator: Annotated[
        str, typer.Option(help=f"{CALIBRATOR_NAMES}.")
    ] = "percentile-99.999",
    smooth: Annotated[bool, typer.Option(help="SmoothQuant first.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """What each kernel of each layer costs in INT8: alone, and left out alone.

    Every measurement is kept at once; a run that was cut short goes on where it
    stopped.
    """
    from int8qa.build.laboratory import measure_one
    from int8qa.build.options import LaboratoryOptions
    from int8qa.build.report import show_sensitivity

    chosen: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    result = measure_one(
        LaboratoryOptions(
            revision=revision,
            sources=make_sources(calibration_data, data, calibration_limit, limit),
            recipes=(load_recipe_argument(recipe),),
            sensitivity_questions=limit,
            cache=cache,
            **chosen,
        ),
        parse_calibrator_argument(calibrator),
        smooth=smooth,
    )
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_sensitivity(result)
