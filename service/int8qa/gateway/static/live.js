// The live comparison: /v1/comparison asked every other second while somebody looks.

import { build, count, describe, find, formatMs, formatRatio, formatShare, groupDigits, nameOf } from "./dom.js";
import { drawDistributions, drawSparkline, hasCounts } from "./charts.js";
import { fetchJson } from "./gateway.js";

const LONGEST_INTERVAL_MS = 30_000;
const MOST_POINTS = 1800;

/** Calls `work` again and again; rests in a hidden tab, backs off on errors. */
export class Poll {
  constructor(work, { intervalMs, onError }) {
    this.work = work;
    this.intervalMs = intervalMs;
    this.onError = onError;
    this.failures = 0;
    this.timer = null;
    this.running = false;
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Ask at once, unless nobody looks. */
  async refresh() {
    clearTimeout(this.timer);
    if (document.hidden || this.running) {
      return;
    }
    this.running = true;
    try {
      await this.work();
      this.failures = 0;
    } catch (error) {
      this.failures += 1;
      this.onError(error, this.delayMs() / 1000);
    } finally {
      this.running = false;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), this.delayMs());
  }

  delayMs() {
    return Math.min(this.intervalMs * 2 ** this.failures, LONGEST_INTERVAL_MS);
  }
}

/** The section of the page that shows /v1/comparison. */
export class LiveReport {
  constructor() {
    this.history = [];
    this.report = null;
    new ResizeObserver(() => this.drawChart()).observe(find("live-report"));
  }

  async refresh() {
    const report = await fetchJson("v1/comparison");
    this.report = report;
    this.remember(report);
    setText("live-state", "");
    const hasPairs = report.count > 0;
    find("no-pairs").hidden = hasPairs;
    find("live-report").hidden = !hasPairs;
    if (hasPairs) {
      this.showTiles(report);
      this.showPercentiles(report);
      this.showDisagreements(report.disagreements ?? []);
      this.drawChart();
    }
  }

  fail(error, delay_s) {
    setText("live-state", `${error.title ?? "No report"}. Asking again in ${delay_s} s.`);
  }

  remember(report) {
    const { speedup, agreement } = report;
    this.history.push({ at_s: performance.now() / 1000, speedup, agreement });
    if (this.history.length > MOST_POINTS) {
      this.history = this.history.filter((_, index) => index % 2 === 0);
    }
  }

  points(name) {
    return this.history
      .filter((point) => typeof point[name] === "number")
      .map((point) => ({ at_s: point.at_s, value: point[name] }));
  }

  showTiles(report) {
    const faster = report.speedup >= 1 ? "INT8 is faster" : "INT8 is slower";
    fillTile("speedup-tile", {
      title: "Speed-up",
      value: formatRatio(report.speedup),
      note: `${typeof report.speedup === "number" ? `${faster}; ` : ""}median over pairs of FP16 time / INT8 time`,
      chart: this.buildTrend("speedup", formatRatio, { lowest: 0, guides: [1] }),
    });
    const agreed = typeof report.agreement === "number" ? Math.round(report.agreement * report.count) : null;
    const threshold = report.guard?.threshold;
    fillTile("agreement-tile", {
      title: "Same answer",
      value: formatShare(report.agreement),
      note: agreed === null ? "" : `${groupDigits(agreed)} of ${count(report.count, "pair")}`,
      chart: this.buildTrend("agreement", formatShare, {
        lowest: 0,
        highest: 1.005,
        guides: typeof threshold === "number" ? [threshold] : [],
      }),
    });
    showGuard(report);
  }

  buildTrend(name, format, options) {
    const points = this.points(name);
    if (points.length < 2) {
      return null;
    }
    const [first, last] = [points[0], points[points.length - 1]];
    const minutes = Math.max(1, Math.round((last.at_s - first.at_s) / 60));
    const label = `Since this page was opened, ${count(minutes, "minute")}: from ${format(first.value)} to ${format(last.value)}.`;
    const values = points.map((point) => point.value);
    return build(
      "div",
      { class: "trend-row" },
      drawSparkline(points, { label, ...options }),
      build(
        "p",
        { class: "hint", title: "highest and lowest since this page was opened" },
        [...new Set([Math.max(...values), Math.min(...values)].map(format))].map((value) =>
          build("span", {}, value),
        ),
      ),
    );
  }

  showPercentiles(report) {
    setText("pair-count", `${count(report.count, "pair")}, at most ${groupDigits(report.window)}`);
    const rows = [
      ["int8", report.int8, "INT8"],
      ["fp16", report.fp16, "FP16"],
    ].map(([precision, summary, name]) =>
      build(
        "tr",
        { class: precision },
        build("th", { scope: "row" }, name),
        ["p50_ms", "p95_ms", "p99_ms"].map((key) => build("td", {}, formatMs(summary[key]))),
      ),
    );
    find("percentiles").replaceChildren(...rows);
    setText("sampling", describeSampling(report));
  }

  showDisagreements(disagreements) {
    find("disagreements").hidden = disagreements.length === 0;
    const side = (part) =>
      part === null ? "no answer" : `${part.start}–${part.end} (${part.score.toFixed(2)})`;
    replaceIfChanged(
      find("disagreement-list"),
      disagreements.map((one) =>
        build(
          "li",
          {},
          build("span", { class: "int8" }, `INT8 ${side(one.int8)}`),
          build("span", { class: "fp16" }, `FP16 ${side(one.fp16)}`),
          build(
            "span",
            { class: "hint" },
            `${count(one.windows, "window")}, ${count(one.context_chars, "character")}; request `,
            build("code", {}, one.request_id),
          ),
        ),
      ),
    );
  }

  drawChart() {
    const histogram = this.report?.latency_histogram;
    const shown = hasCounts(histogram);
    find("latency-figure").hidden = !shown;
    const chart = find("latency-chart");
    const width = Math.floor(chart.clientWidth);
    if (!shown || width < 100) {
      return;
    }
    const medians = { int8: this.report.int8.p50_ms, fp16: this.report.fp16.p50_ms };
    chart.replaceChildren(drawDistributions(histogram, medians, width));
  }
}

function showGuard(report) {
  const { guard } = report;
  find("guard-tile").hidden = guard === undefined;
  if (guard === undefined) {
    return;
  }
  const states = {
    collecting: ["Collecting", `${guard.pairs} of the ${count(guard.needed, "pair")} it judges by`],
    ok: ["OK", `${formatShare(guard.agreement)} of the last ${count(guard.needed, "pair")} agree`],
    tripped: ["Tripped", `only ${formatShare(guard.agreement)} of the last ${count(guard.needed, "pair")} agree`],
  };
  const off = guard.mode === "off";
  const [value, note] = off ? ["Off", "nothing is watched"] : (states[guard.state] ?? [guard.state, ""]);
  const acts = guard.mode === "fallback" ? "falls back to FP16" : "alerts";
  fillTile("guard-tile", {
    title: "Guard of agreement",
    value,
    kind: off ? "off" : guard.state,
    note,
    chart: build(
      "dl",
      { class: "small-facts" },
      off ? null : describe(acts, `below ${formatShare(guard.threshold)}`),
      describe("no precision named", `gets ${nameOf(guard.serving)}`),
      off ? null : describe("switches", groupDigits(guard.switches)),
    ),
  });
}

function describeSampling(report) {
  const parts = [];
  const { sampling } = report;
  if (sampling?.fraction > 0) {
    parts.push(
      `${formatShare(sampling.fraction)} of answered questions are asked again of both, when nothing else waits; that took ${formatShare(sampling.spent_share)} of the time, of ${formatShare(sampling.capacity_share)} allowed.`,
    );
  } else if (sampling !== undefined) {
    parts.push("The service compares nothing by itself: only questions asked of both count.");
  }
  if (sampling?.disturbed > 0) {
    parts.push(`${count(sampling.disturbed, "pair")} met other traffic; their times do not count.`);
  }
  if (report.errors > 0) {
    parts.push(`${count(report.errors, "pair")} failed.`);
  }
  return parts.join(" ");
}

/** Change a tile's texts in place, so that a screen reader is not thrown out of it. */
function fillTile(id, { title, value, note, chart, kind = null }) {
  const tile = find(id);
  if (kind !== null) {
    tile.dataset.kind = kind;
  }
  if (tile.childElementCount === 0) {
    tile.append(
      build("h3", {}),
      build("p", { class: "value" }),
      build("p", { class: "hint" }),
      build("div", { class: "trend" }),
    );
  }
  const [heading, number, line, trend] = tile.children;
  heading.textContent = title;
  number.textContent = value;
  line.textContent = note;
  trend.replaceChildren(...[chart].filter(Boolean));
}

/** Write only what changed, so that a live region speaks only then. */
function setText(id, text) {
  const node = find(id);
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

function replaceIfChanged(node, children) {
  const wanted = children.map((child) => child.textContent).join("\n");
  if (node.dataset.shown !== wanted) {
    node.dataset.shown = wanted;
    node.replaceChildren(...children);
  }
}
