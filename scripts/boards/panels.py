"""The kinds of panel that the boards are made of.

In: titles, units, PromQL. Out: Grafana's own model, by its foundation SDK, whose types
hold each option to Grafana's schema. Every panel must say what it shows and in which
unit. Knows no metric by name, and not where a panel goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    bargauge,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import (
    common as common_builders,
)
from grafana_foundation_sdk.builders import (
    dashboard as boards,
)
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as prometheus_model

DATA_SOURCE_UID = "int8qa-prometheus"
"""As provisioned in docker/grafana/provisioning/datasources."""
DATA_SOURCE = model.DataSourceRef(type_val="prometheus", uid=DATA_SOURCE_UID)

GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "#8e8e8e"
PRECISION_COLORS = {
    "^int8": "#73bf69",
    "^fp16": "#5794f2",
    "^fp32": GREY,
    "^both": "#b877d9",
}
"""One colour for one precision, on every panel; keys match the legend."""

Steps = Sequence[tuple[float | None, str]]
"""Thresholds, ascending: from which value on which colour; the first from None."""
PLAIN: Steps = ((None, BLUE),)

Panel = (
    timeseries.Panel
    | stat.Panel
    | heatmap.Panel
    | bargauge.Panel
    | statetimeline.Panel
    | table.Panel
)


@dataclass(frozen=True)
class Query:
    """One PromQL query of a panel."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True)
class Placed:
    """A panel and its width in columns of the grid's 24."""

    panel: Panel
    columns: int


def show_value(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    columns: int,
    steps: Steps = PLAIN,
    decimals: int | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
    empty: str = "no data",
) -> Placed:
    """One number, large; ``words`` maps values to (text, colour)."""
    panel = (
        stat.Panel()
        .unit(unit)
        .no_value(empty)
        .thresholds(_list_steps(steps))
        .color_scheme(_color_by(model.FieldColorModeId.THRESHOLDS))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(
            common.BigValueGraphMode.NONE if words else common.BigValueGraphMode.AREA
        )
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_build_query(query, "A"))
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    if words:
        panel = panel.mappings([_map_words(words)])
    return _describe(panel, title, description, columns)


def draw_lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    columns: int,
    steps: Steps = PLAIN,
    stacked: bool = False,
    smallest: float | None = 0,
    largest: float | None = None,
    logarithmic: bool = False,
) -> Placed:
    """Lines over time; thresholds beyond the first are drawn across."""
    crossed = len(steps) > 1
    panel = (
        timeseries.Panel()
        .unit(unit)
        .no_value("no data")
        .thresholds(_list_steps(steps))
        .thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(
                common.GraphThresholdsStyleMode.DASHED
                if crossed
                else common.GraphThresholdsStyleMode.OFF
            )
        )
        .color_scheme(_color_by(model.FieldColorModeId.PALETTE_CLASSIC))
        .line_width(1 if stacked else 2)
        .fill_opacity(40 if stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        # A missed scrape or two is no gap; a stopped service is one.
        .span_nulls(60_000)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(
            common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A")
        )
    if smallest is not None and not logarithmic:
        panel = panel.min(smallest)
    if largest is not None:
        panel = panel.max(largest)
    if logarithmic:
        panel = panel.scale_distribution(
            common_builders.ScaleDistributionConfig()
            .type(common.ScaleDistribution.LOG)
            .log(10)
        )
    for pattern, color in PRECISION_COLORS.items():
        if not stacked and any(q.legend.startswith("{{precision}}") for q in queries):
            panel = panel.override_by_regexp(pattern, _paint(color))
    for number, query in enumerate(queries):
        panel = panel.with_target(_build_query(query, chr(ord("A") + number)))
    return _describe(panel, title, description, columns)


def draw_heatmap(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    columns: int,
    scheme: str,
) -> Placed:
    """Buckets of a histogram over time: darker is more."""
    panel = (
        heatmap.Panel()
        .no_value("no data")
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme(scheme)
            .scale(heatmap_model.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .fill("dark-orange")
        )
        .rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.AUTO))
        .y_axis(
            heatmap.YAxisConfig()
            .axis_placement(common.AxisPlacement.LEFT)
            .unit(unit)
            .reverse(False)
        )
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .mode(common.TooltipDisplayMode.SINGLE)
        .show_y_histogram()
        .show_legend()
        .exemplars_color("rgba(255,0,255,0.7)")
        .unit(unit)
        .thresholds(_list_steps(PLAIN))
        .with_target(
            _build_query(query, "A").format(prometheus_model.PromQueryFormat.HEATMAP)
        )
    )
    return _describe(panel, title, description, columns)


def draw_bars(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    columns: int,
    steps: Steps,
    smallest: float,
    largest: float,
    decimals: int,
) -> Placed:
    """One bar for each series' latest value."""
    panel = (
        bargauge.Panel()
        .unit(unit)
        .no_value("no data")
        .decimals(decimals)
        .min(smallest)
        .max(largest)
        .thresholds(_list_steps(steps))
        .color_scheme(_color_by(model.FieldColorModeId.THRESHOLDS))
        .orientation(common.VizOrientation.HORIZONTAL)
        .display_mode(common.BarGaugeDisplayMode.BASIC)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_build_query(query, "A").instant())
    )
    return _describe(panel, title, description, columns)


def draw_states(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    columns: int,
    words: Mapping[str, tuple[str, str]],
    empty: str = "no data",
) -> Placed:
    """States over time; ``words`` maps values to (text, colour)."""
    panel = (
        statetimeline.Panel()
        .unit("none")
        .no_value(empty)
        .mappings([_map_words(words)])
        .thresholds(_list_steps(PLAIN))
        .color_scheme(_color_by(model.FieldColorModeId.THRESHOLDS))
        .show_value(common.VisibilityMode.AUTO)
        .merge_values(True)
        .fill_opacity(70)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    for number, query in enumerate(queries):
        panel = panel.with_target(_build_query(query, chr(ord("A") + number)))
    return _describe(panel, title, description, columns)


def list_labels(
    title: str,
    description: str,
    query: Query,
    *,
    columns: int,
    labels: Sequence[str],
    empty: str,
) -> Placed:
    """A table of the series' labels, in the order given."""
    panel = (
        table.Panel()
        .unit("none")
        .no_value(empty)
        .thresholds(_list_steps(PLAIN))
        .show_header(True)
        .with_target(
            _build_query(query, "A")
            .instant()
            .format(prometheus_model.PromQueryFormat.TABLE)
        )
        .with_transformation(
            model.DataTransformerConfig(
                id_val="filterFieldsByName", options={"include": {"names": [*labels]}}
            )
        )
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={"indexByName": {name: n for n, name in enumerate(labels)}},
            )
        )
    )
    return _describe(panel, title, description, columns)


def _describe(panel: Panel, title: str, description: str, columns: int) -> Placed:
    described = panel.title(title).description(description).datasource(DATA_SOURCE)
    return Placed(described, columns)


def _build_query(query: Query, ref_id: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(query.expr)
        .legend_format(query.legend)
        .editor_mode(prometheus_model.QueryEditorMode.CODE)
        .exemplar(query.exemplars)
        .datasource(DATA_SOURCE)
        .ref_id(ref_id)
        .range()
    )


def _list_steps(steps: Steps) -> boards.ThresholdsConfig:
    return (
        boards.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in steps])
    )


def _color_by(mode: model.FieldColorModeId) -> boards.FieldColor:
    return boards.FieldColor().mode(mode)


def _paint(color: str) -> list[model.DynamicConfigValue]:
    value = {"mode": "fixed", "fixedColor": color}
    return [model.DynamicConfigValue(id_val="color", value=value)]


def _map_words(words: Mapping[str, tuple[str, str]]) -> model.ValueMap:
    return model.ValueMap(
        options={
            value: model.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(words.items())
        }
    )
