// Two small charts in plain SVG: distributions of time, and a line over time.

import { draw, formatMs, nameOf } from "./dom.js";

const PRECISIONS = ["int8", "fp16"];
const HEIGHT = 230;
const MARGIN = { top: 40, right: 12, bottom: 26, left: 12 };
const LEAST_BINS = 10;
const TICK_ROOM = 22;
const LABEL_ROOM = 140;

/**
 * The latency distributions of both precisions over one logarithmic axis.
 * `histogram` is that of /v1/comparison, `medians` {int8, fp16} in ms or null,
 * `width` in CSS pixels.
 */
export function drawDistributions(histogram, medians, width) {
  const { edges_ms: edges } = histogram;
  const [first, last] = findOccupied(histogram);
  const [lowest, highest] = [Math.log(edges[first]), Math.log(edges[last])];
  const inner = width - MARGIN.left - MARGIN.right;
  const floor = HEIGHT - MARGIN.bottom;
  const x = (ms) => MARGIN.left + (inner * (Math.log(ms) - lowest)) / (highest - lowest);
  const shares = PRECISIONS.map((precision) => {
    const total = histogram[precision].reduce((sum, bin) => sum + bin, 0);
    return histogram[precision].map((bin) => (total > 0 ? bin / total : 0));
  });
  const most = Math.max(...shares.flat());
  const y = (share) => floor - ((floor - MARGIN.top) * share) / most;

  const svg = draw("svg", {
    role: "img",
    width,
    height: HEIGHT,
    viewBox: `0 0 ${width} ${HEIGHT}`,
    "aria-label": describeDistributions(medians, edges[first], edges[last]),
  });
  for (const ms of listTicks(edges[first], edges[last], inner)) {
    if (x(ms) < TICK_ROOM || x(ms) > width - TICK_ROOM) {
      continue; // half of it would be cut off
    }
    svg.append(
      draw("line", { class: "grid", x1: x(ms), x2: x(ms), y1: MARGIN.top, y2: floor }),
      draw("text", { class: "tick", x: x(ms), y: HEIGHT - 8, "text-anchor": "middle" }, formatTick(ms)),
    );
  }
  svg.append(draw("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: floor, y2: floor }));
  PRECISIONS.forEach((precision, index) => {
    let path = `M${x(edges[first]).toFixed(1)} ${floor}`;
    for (let bin = first; bin < last; bin += 1) {
      const height = y(shares[index][bin]).toFixed(1);
      path += `V${height}H${x(edges[bin + 1]).toFixed(1)}`;
    }
    svg.append(draw("path", { class: `area ${precision}`, d: `${path}V${floor}` }));
  });
  PRECISIONS.forEach((precision, index) => {
    const median = medians[precision];
    if (median === null || median < edges[first] || median > edges[last]) {
      return;
    }
    const at = x(median);
    const leftwards = at + LABEL_ROOM > width;
    svg.append(
      draw("line", { class: `median ${precision}`, x1: at, x2: at, y1: 6 + 16 * index, y2: floor }),
      draw(
        "text",
        {
          class: `label ${precision}`,
          x: at + (leftwards ? -6 : 6),
          y: 14 + 16 * index,
          "text-anchor": leftwards ? "end" : "start",
        },
        `${nameOf(precision)} p50 ${formatMs(median)}`,
      ),
    );
  });
  return svg;
}

/** Whether a histogram is there and holds anything. */
export function hasCounts(histogram) {
  return (
    Array.isArray(histogram?.edges_ms) &&
    PRECISIONS.every((precision) => histogram[precision]?.length === histogram.edges_ms.length - 1) &&
    PRECISIONS.some((precision) => histogram[precision].some((bin) => bin > 0))
  );
}

function describeDistributions(medians, fromMs, toMs) {
  const parts = PRECISIONS.filter((precision) => medians[precision] !== null).map(
    (precision) => `${nameOf(precision)}’s median is ${formatMs(medians[precision])}`,
  );
  return `Distribution of the engine’s time per question, from ${formatMs(fromMs)} to ${formatMs(toMs)} on a logarithmic axis. ${parts.join(", ")}. The table holds the percentiles.`;
}

/** The range of edges that holds every count, a little wider, and never too narrow. */
function findOccupied(histogram) {
  const bins = histogram.edges_ms.length - 1;
  const used = [...Array(bins).keys()].filter((bin) =>
    PRECISIONS.some((precision) => histogram[precision][bin] > 0),
  );
  let first = Math.max(0, used[0] - 1);
  let last = Math.min(bins, used[used.length - 1] + 2);
  while (last - first < Math.min(LEAST_BINS, bins)) {
    first = Math.max(0, first - 1);
    last = Math.min(bins, last + 1);
  }
  return [first, last];
}

/** 1, 2 and 5 of each power of ten within a range, fewer where there is no room. */
function listTicks(fromMs, toMs, width) {
  const list = (steps) => {
    const ticks = [];
    for (let power = Math.floor(Math.log10(fromMs)); power <= Math.log10(toMs); power += 1) {
      ticks.push(...steps.map((step) => step * 10 ** power));
    }
    return ticks.filter((ms) => ms > fromMs * 1.04 && ms < toMs / 1.04);
  };
  const room = width / 56;
  return [[1, 2, 5], [1, 3], [1]].map(list).find((ticks) => ticks.length <= room) ?? [];
}

const formatTick = (ms) => (ms >= 1000 ? `${ms / 1000} s` : `${Number(ms.toPrecision(2))} ms`);

/**
 * A line over time. `points` are {at_s, value}, oldest first; `guides` are values
 * that are drawn as thin lines where the scale reaches them.
 */
export function drawSparkline(points, { label, lowest, highest, guides = [], width = 240 }) {
  const height = 44;
  const pad = 4;
  const values = points.map((point) => point.value);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const slack = Math.max((high - low) * 0.15, Math.abs(high) * 0.02, 1e-6);
  low = Math.max(lowest ?? -Infinity, low - slack);
  high = Math.min(highest ?? Infinity, high + slack);
  if (high <= low) {
    low = high - 1;
  }
  const [begin, end] = [points[0].at_s, points[points.length - 1].at_s];
  const x = (at) => pad + ((width - 2 * pad) * (at - begin)) / Math.max(end - begin, 1e-6);
  const y = (value) => height - pad - ((height - 2 * pad) * (value - low)) / (high - low);
  const svg = draw("svg", {
    class: "sparkline",
    role: "img",
    viewBox: `0 0 ${width} ${height}`,
    preserveAspectRatio: "none",
    "aria-label": label,
  });
  for (const guide of guides.filter((one) => one >= low && one <= high)) {
    svg.append(draw("line", { class: "grid", x1: 0, x2: width, y1: y(guide), y2: y(guide) }));
  }
  const line = points.map((point) => `${x(point.at_s).toFixed(1)},${y(point.value).toFixed(1)}`);
  svg.append(draw("polyline", { class: "line", points: line.join(" ") }));
  return svg;
}
