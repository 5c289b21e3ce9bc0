// Fifty example questions, asked of both precisions one after the other.

import { count, find, sleep } from "./dom.js";
import { fetchText, postAnswer } from "./gateway.js";
import { showProblem } from "./problem.js";

const QUESTIONS = 50;
const MOST_WAITS = 5;

/** The button that makes paired traffic; `onPair` is called after each answer. */
export class Traffic {
  constructor(library, onPair) {
    this.library = library;
    this.onPair = onPair;
    this.work = null;
    this.button = find("traffic");
    this.button.addEventListener("click", () => (this.work ? this.work.abort() : this.run()));
  }

  async run() {
    this.work = new AbortController();
    const { signal } = this.work;
    const progress = find("traffic-progress");
    showProblem(find("traffic-problem"), null);
    this.button.textContent = "Stop";
    progress.value = 0;
    progress.hidden = false;
    this.say("Sending");
    let sent = 0;
    let agreed = 0;
    try {
      const questions = await listQuestions(this.library);
      for (; sent < questions.length; sent += 1) {
        const body = await askPatiently(questions[sent], signal);
        agreed += body.comparison.agreement ? 1 : 0;
        progress.value = sent + 1;
        this.onPair();
      }
      this.say(`${count(sent, "question")} sent, ${agreed} answered alike.`);
    } catch (error) {
      if (error.name !== "AbortError") {
        showProblem(find("traffic-problem"), error);
      }
      this.say(`Stopped after ${count(sent, "question")}.`);
    } finally {
      this.work = null;
      progress.hidden = true;
      this.button.textContent = `Send ${QUESTIONS} example questions`;
    }
  }

  say(text) {
    find("traffic-state").textContent = text;
  }
}

/** Bodies of very different lengths, in a fixed order: short notes and parts of the log. */
async function listQuestions({ examples, excerpt_questions: general }) {
  const short = examples
    .filter((example) => example.context !== undefined && example.file === undefined)
    .flatMap(({ context, questions }) => questions.map((question) => ({ question, context })));
  const files = examples.filter((example) => example.file !== undefined);
  const texts = await Promise.all(files.map((example) => fetchText(example.file)));
  const paragraphs = texts.flatMap((text) => text.split("\n\n").slice(1));
  const excerpts = general.flatMap((question, shift) =>
    Array.from({ length: 8 }, (_, index) => {
      const from = (shift * 13 + index * 7) % Math.max(1, paragraphs.length - 8);
      return { question, context: paragraphs.slice(from, from + 1 + (index % 6)).join("\n\n") };
    }),
  );
  const all = excerpts.flatMap((excerpt, index) =>
    index < short.length ? [short[index], excerpt] : [excerpt],
  );
  return all.slice(0, QUESTIONS).map((one) => ({ ...one, precision: "both" }));
}

async function askPatiently(body, signal) {
  for (let waits = 0; ; waits += 1) {
    try {
      return await postAnswer(body, signal);
    } catch (error) {
      if (!error.passes || waits === MOST_WAITS) {
        throw error;
      }
      await sleep((error.retryAfterS ?? 1) * 1000, signal);
    }
  }
}
