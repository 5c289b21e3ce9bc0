// Puts the page together.

import { AskForm } from "./ask.js";
import { find } from "./dom.js";
import { fetchJson } from "./gateway.js";
import { KeyForm } from "./key.js";
import { LiveReport, Poll } from "./live.js";
import { ModelCard } from "./models.js";
import { showProblem } from "./problem.js";
import { Traffic } from "./traffic.js";

const NO_LIBRARY = { examples: [], excerpt_questions: [] };

async function start() {
  const live = new LiveReport();
  const livePoll = new Poll(() => live.refresh(), {
    intervalMs: 2000,
    onError: (error, delay_s) => live.fail(error, delay_s),
  });
  const library = await fetchJson("static/examples.json").catch((error) => {
    showProblem(find("ask-problem"), error);
    return NO_LIBRARY;
  });
  const form = new AskForm(library.examples, () => livePoll.refresh());
  const card = new ModelCard((report) => {
    const wanted = report.precisions.includes("both") ? "both" : report.default_precision;
    form.offerPrecisions(report.precisions, wanted);
    // Pairs need both precisions.
    find("traffic").hidden = !report.precisions.includes("both") || library === NO_LIBRARY;
  });
  const cardPoll = new Poll(() => card.refresh(), {
    intervalMs: 10_000,
    onError: () => card.fail(),
  });
  new Traffic(library, () => livePoll.refresh());
  const refresh = () => {
    livePoll.refresh();
    cardPoll.refresh();
  };
  new KeyForm(refresh);
  refresh();
}

start();
