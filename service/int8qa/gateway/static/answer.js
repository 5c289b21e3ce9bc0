// One question's outcome: each precision's answers and times, and the text.

import {
  build,
  count,
  describe,
  draw,
  formatMs,
  formatRatio,
  groupDigits,
  nameOf,
  prefersLessMotion,
} from "./dom.js";
import { cutPieces } from "./offsets.js";

const STAGES = ["tokenize", "queue", "inference", "decode"];
const STAGE_NOTES = {
  tokenize: "texts to windows",
  queue: "waiting for the engine",
  inference: "in the engine",
  decode: "logits to answers",
};

/** Show what POST /v1/answer said of a text. Returns one sentence that sums it up. */
export function showResult(container, body, context) {
  const runs = listRuns(body);
  const view = new TextView(context, runs);
  const longestMs = Math.max(...runs.map((run) => run.timing_ms.total));
  container.replaceChildren(
    buildFacts(body, runs),
    build(
      "div",
      { class: "runs" },
      runs.map((run) => buildRun(run, longestMs, view)),
    ),
    view.node,
  );
  container.hidden = false;
  view.selectFirst();
  return summarize(body, runs);
}

/** Per precision: {precision, answers, timing_ms}, best answer first. */
function listRuns(body) {
  const parts = body.comparison
    ? ["int8", "fp16"].map((precision) => [precision, body.comparison[precision]])
    : [[body.precision, body]];
  return parts.map(([precision, part]) => ({
    precision,
    best: part.answer,
    answers: [part.answer, ...part.alternatives],
    timing_ms: part.timing_ms,
  }));
}

function wordOf(answer) {
  return answer === null || answer.text === "" ? "no answer" : `“${answer.text}”`;
}

function summarize(body, runs) {
  if (!body.comparison) {
    const [run] = runs;
    return `${nameOf(run.precision)} answers ${wordOf(run.best)} in ${formatMs(run.timing_ms.total)}.`;
  }
  const [int8, fp16] = runs;
  const words = body.comparison.agreement
    ? `INT8 and FP16 agree: ${wordOf(int8.best)}.`
    : `INT8 and FP16 differ: ${wordOf(int8.best)} and ${wordOf(fp16.best)}.`;
  return `${words} INT8 took ${formatMs(int8.timing_ms.inference)} in the engine, FP16 ${formatMs(fp16.timing_ms.inference)}.`;
}

function buildFacts(body, runs) {
  const facts = [];
  if (body.comparison) {
    const { agreement, speedup } = body.comparison;
    facts.push(
      buildFact("Same answer", agreement ? "Yes" : "No", agreement ? "agree" : "differ"),
      buildFact("Speed-up, FP16 / INT8", formatRatio(speedup), speedup >= 1 ? "faster" : "slower"),
    );
  } else {
    facts.push(buildFact("Total", formatMs(runs[0].timing_ms.total)));
  }
  facts.push(buildFact("Text", count(body.windows, "window")));
  return build("dl", { class: "facts" }, facts);
}

function buildFact(term, value, kind = null) {
  return build("div", { "data-kind": kind }, describe(term, value));
}

function buildRun(run, longestMs, view) {
  const name = nameOf(run.precision);
  return build(
    "article",
    { class: `run ${run.precision}`, "aria-label": `${name}’s answers` },
    build("h3", {}, name),
    build(
      "ol",
      { class: "answers", "aria-label": `${name}’s answers, best first` },
      run.answers.map((answer, rank) => build("li", {}, buildAnswer(answer, rank, run, view))),
    ),
    buildStages(run, longestMs),
  );
}

function buildAnswer(answer, rank, run, view) {
  const isEmpty = answer === null || answer.text === "";
  const score = answer === null ? null : answer.score;
  const parts = [
    isEmpty
      ? build("span", { class: "none" }, "No answer in this text")
      : build("span", { class: "words", dir: "auto" }, answer.text),
    score === null
      ? null
      : build("span", { class: "score" }, build("span", { class: "unseen" }, "score "), score.toFixed(2)),
  ];
  const kind = rank === 0 ? "best" : "alternative";
  if (isEmpty) {
    return build("p", { class: `answer ${kind}` }, parts);
  }
  const button = build(
    "button",
    {
      type: "button",
      class: `answer ${kind}`,
      "aria-pressed": "false",
      title: "Show in the text",
      click: () => view.select(answer, button),
    },
    parts,
  );
  if (rank === 0) {
    view.offer(answer, button);
  }
  return button;
}

/** Where a run's time went: a bar on the scale of the longer run, and the numbers. */
function buildStages(run, longestMs) {
  const { timing_ms: timing } = run;
  const label = STAGES.map((stage) => `${stage} ${formatMs(timing[stage])}`).join(", ");
  const bar = draw("svg", {
    class: "stage-bar",
    role: "img",
    width: "100%",
    height: 14,
    "aria-label": `${nameOf(run.precision)}: ${label}`,
  });
  let fromMs = 0;
  for (const stage of STAGES) {
    const share = (ms) => `${((100 * ms) / longestMs).toFixed(3)}%`;
    bar.append(
      draw(
        "rect",
        { class: `stage ${stage}`, x: share(fromMs), y: 0, width: share(timing[stage]), height: 14 },
        draw("title", {}, `${stage}: ${formatMs(timing[stage])}`),
      ),
    );
    fromMs += timing[stage];
  }
  return build(
    "div",
    { class: "stages" },
    bar,
    build(
      "dl",
      {},
      STAGES.map((stage) =>
        build(
          "div",
          { title: STAGE_NOTES[stage] },
          build("dt", {}, build("i", { class: `swatch ${stage}` }), stage),
          build("dd", {}, formatMs(timing[stage])),
        ),
      ),
      build("div", { class: "total" }, describe("total", formatMs(timing.total))),
    ),
  );
}

/** The text with each precision's answer underlined and the selected one highlighted. */
class TextView {
  constructor(context, runs) {
    this.context = context;
    this.best = runs
      .filter((run) => run.best !== null && run.best.text !== "")
      .map((run) => ({ start: run.best.start, end: run.best.end, kind: run.precision }));
    this.offers = [];
    this.pressed = null;
    this.box = build("div", {
      class: "text",
      id: "text-view",
      tabindex: 0,
      role: "region",
      "aria-label": "The text, with the answer highlighted",
      dir: "auto",
    });
    this.place = build("span", { class: "hint" });
    this.node = build(
      "div",
      { class: "text-view" },
      build(
        "div",
        { class: "label-row" },
        build("h3", {}, "In the text"),
        this.place,
        build(
          "span",
          { class: "hint" },
          this.best.map((one) => [build("span", { class: `underlined ${one.kind}` }, nameOf(one.kind)), " "]).flat(),
        ),
      ),
      this.box,
    );
  }

  /** Let an answer be shown from its button. */
  offer(answer, button) {
    this.offers.push([answer, button]);
  }

  selectFirst() {
    if (this.offers.length > 0) {
      this.select(...this.offers[0]);
    } else {
      this.box.replaceChildren(this.context);
    }
  }

  select(answer, button) {
    this.pressed?.setAttribute("aria-pressed", "false");
    this.pressed = button;
    button.setAttribute("aria-pressed", "true");
    const marks = [...this.best, { start: answer.start, end: answer.end, kind: "selected" }];
    this.box.replaceChildren(
      ...cutPieces(this.context, marks).map((piece) =>
        piece.kinds.length === 0
          ? piece.text
          : build("mark", { class: piece.kinds.join(" ") }, piece.text),
      ),
    );
    this.place.textContent = `characters ${groupDigits(answer.start)} to ${groupDigits(answer.end)}`;
    this.scroll();
  }

  /** Scroll the box, not the page, to the selected answer. */
  scroll() {
    const mark = this.box.querySelector("mark.selected");
    if (mark === null) {
      return;
    }
    const box = this.box.getBoundingClientRect();
    const place = mark.getBoundingClientRect();
    this.box.scrollTo({
      top: this.box.scrollTop + place.top - box.top - (box.height - place.height) / 2,
      behavior: prefersLessMotion() ? "instant" : "smooth",
    });
  }
}
