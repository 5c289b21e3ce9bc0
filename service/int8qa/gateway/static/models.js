// What is loaded: the verdict, a column per precision, and a line for the shell.

import { build, find, groupDigits, nameOf } from "./dom.js";
import { fetchJson } from "./gateway.js";

/** The section that shows /v1/models, and the state of the service at the top. */
export class ModelCard {
  constructor(onReport) {
    this.onReport = onReport;
    this.shown = "";
    find("curl").textContent = buildCurlLine();
    find("copy").addEventListener("click", copyCurlLine);
  }

  async refresh() {
    const report = await fetchJson("v1/models");
    const waiting = report.models.filter((model) => !model.ready);
    if (waiting.length === 0) {
      setState("ready", `Ready: ${report.checkpoint}`);
    } else {
      setState("wait", `Not ready: ${waiting.map((model) => nameOf(model.precision)).join(", ")}`);
    }
    const text = JSON.stringify(report);
    if (text !== this.shown) {
      this.shown = text;
      show(report);
      this.onReport(report);
    }
  }

  fail() {
    setState("down", "Not reachable");
  }
}

function setState(state, text) {
  const node = find("service-state");
  if (node.textContent !== text) {
    node.dataset.state = state;
    node.textContent = text;
  }
}

function show(report) {
  find("verdict").textContent = report.verdict;
  find("verdict").hidden = report.verdict === "";
  find("verdict-heading").hidden = report.verdict === "";
  const { models } = report;
  const row = (title, read) =>
    build(
      "tr",
      {},
      build("th", { scope: "row" }, title),
      models.map((model) => build("td", {}, read(model))),
    );
  const remark = (model) =>
    [
      model.precision === report.default_precision ? "default" : null,
      // A soft hyphen: the column is narrow on a phone.
      model.precision === report.recommended ? "recom\u00admended" : null,
    ]
      .filter(Boolean)
      .join(", ");
  find("model-table").replaceChildren(
    build("caption", {}, report.checkpoint),
    build(
      "thead",
      {},
      build(
        "tr",
        {},
        build("td", {}),
        models.map((model) =>
          build("th", { scope: "col", class: model.precision }, nameOf(model.precision)),
        ),
      ),
    ),
    build(
      "tbody",
      {},
      row("State", (model) => (model.ready ? "ready" : "not ready")),
      row("Role", (model) => remark(model) || "–"),
      row("F1 at build", (model) => formatScore(model.f1)),
      row("Exact match", (model) => formatScore(model.exact_match)),
      row("Engine", (model) => model.engine),
      row("Really runs in", (model) => model.execution || "–"),
      row("Calibrator", (model) => dashIfNone(model.calibrator)),
      row("Recipe", (model) => dashIfNone(model.recipe)),
      row("Size", (model) => formatSize(model.size_bytes)),
    ),
  );
  find("models").hidden = false;
}

const formatScore = (score) => (score === null ? "not measured" : score.toFixed(2));
const dashIfNone = (name) => (name === "none" ? "–" : name);

function formatSize(bytes) {
  const megabytes = bytes / 1e6;
  return megabytes < 0.1 ? `${groupDigits(bytes)} B` : `${groupDigits(megabytes, 1)} MB`;
}

// A line for the shell.

function buildCurlLine() {
  const url = new URL("v1/answer", window.location.href);
  const body = JSON.stringify({
    question: "Who presented the tide tables?",
    context: "Ingrid Sørensen presented the new tide tables.",
    precision: "both",
  });
  // Inside single quotes a shell reads nothing but the next single quote.
  const quoted = `'${url.href.replaceAll("'", "%27")}'`;
  return `curl -s ${quoted} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`;
}

async function copyCurlLine() {
  const line = find("curl");
  try {
    // Only there on localhost and over HTTPS.
    await navigator.clipboard.writeText(line.textContent);
    find("copy-state").textContent = "Copied.";
  } catch {
    window.getSelection().selectAllChildren(line);
    line.focus();
    find("copy-state").textContent = "Selected: copy it with Ctrl or ⌘ + C.";
  }
}
