// The form: examples, own text, files; a question asked, and asked again when told to wait.

import { showResult } from "./answer.js";
import { build, count, find, nameOf, prefersLessMotion, sleep } from "./dom.js";
import { Problem, fetchText, postAnswer } from "./gateway.js";
import { countCodePoints } from "./offsets.js";
import { showProblem } from "./problem.js";

const MAX_FILE_BYTES = 16 * 2 ** 20;
const MAX_TRIES = 30;
const FIELDS = { context: "context", question: "question", top_k: "top-k" };

/** Wires the form; `onAnswer` is called after each answer. */
export class AskForm {
  constructor(examples, onAnswer) {
    this.examples = examples;
    this.onAnswer = onAnswer;
    this.form = find("ask-form");
    this.context = find("context");
    this.question = find("question");
    this.work = null;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.ask();
      }
    });
    find("cancel").addEventListener("click", () => this.cancel());
    this.context.addEventListener("input", () => this.noteOwnText());
    this.acceptFiles();
    this.listExamples();
    this.offerPrecisions(["int8", "fp16", "both"], "both");
  }

  /** Offer what the service serves, keeping what was chosen where it still can be. */
  offerPrecisions(precisions, wanted) {
    const chosen = this.form.elements.precision?.value;
    const checked = [chosen, wanted, precisions[0]].find((one) => precisions.includes(one));
    find("precisions").replaceChildren(
      ...precisions.map((precision) =>
        build(
          "label",
          { class: `choice ${precision}` },
          build("input", {
            type: "radio",
            name: "precision",
            value: precision,
            checked: precision === checked,
          }),
          build("span", {}, nameOf(precision)),
        ),
      ),
    );
  }

  // Texts.

  listExamples() {
    const buttons = this.examples.map((example) =>
      build(
        "button",
        { type: "button", "aria-pressed": "false", click: () => this.chooseExample(example) },
        build("strong", {}, example.title),
        build("span", {}, example.note),
      ),
    );
    find("examples").replaceChildren(...buttons);
    if (this.examples.length > 0) {
      this.chooseExample(this.examples[0]);
    }
  }

  async chooseExample(example) {
    this.chosen = example;
    this.press(example);
    try {
      example.context ??= await fetchText(example.file);
    } catch (error) {
      showProblem(find("ask-problem"), error);
      return;
    }
    if (this.chosen !== example) {
      return; // another was chosen while this one was fetched
    }
    this.setText(example.context);
    this.question.value = example.questions[0];
    find("suggestions").replaceChildren(
      ...example.questions.slice(1).map((question) =>
        build("button", { type: "button", click: () => this.suggest(question) }, question),
      ),
    );
  }

  suggest(question) {
    this.question.value = question;
    this.ask();
  }

  press(example) {
    [...find("examples").children].forEach((button, index) => {
      button.setAttribute("aria-pressed", String(this.examples[index] === example));
    });
  }

  setText(text) {
    this.context.value = text;
    this.context.scrollTop = 0;
    this.noteSize();
  }

  noteOwnText() {
    this.chosen = null;
    this.press(null);
    find("suggestions").replaceChildren();
    this.noteSize();
  }

  noteSize() {
    // What the textarea gives back is what is sent: line ends are already settled.
    find("context-size").textContent = count(countCodePoints(this.context.value), "character");
  }

  // Files.

  acceptFiles() {
    const input = find("file");
    const drop = find("drop");
    input.addEventListener("change", () => {
      if (input.files.length > 0) {
        this.openFile(input.files[0]);
      }
      input.value = "";
    });
    const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const lift = () => drop.classList.remove("over");
    drop.addEventListener("dragover", (event) => {
      if (carriesFile(event)) {
        event.preventDefault();
        drop.classList.add("over");
      }
    });
    drop.addEventListener("dragleave", lift);
    drop.addEventListener("drop", (event) => {
      lift();
      if (event.dataTransfer.files.length > 0) {
        event.preventDefault();
        this.openFile(event.dataTransfer.files[0]);
      }
    });
    // A file dropped beside the field would otherwise replace the page.
    for (const type of ["dragover", "drop"]) {
      window.addEventListener(type, (event) => {
        if (carriesFile(event)) {
          event.preventDefault();
        }
      });
    }
  }

  async openFile(file) {
    try {
      if (file.size > MAX_FILE_BYTES) {
        throw new Problem({
          title: "Too large for this page",
          detail: `The file has ${count(file.size, "byte")}; this page opens up to ${count(MAX_FILE_BYTES, "byte")}. Send a part of it`,
        });
      }
      this.setText(await readText(file));
      this.noteOwnText();
      showProblem(find("ask-problem"), null);
      this.announce(`Opened ${file.name}.`);
      this.question.focus();
    } catch (error) {
      showProblem(find("ask-problem"), error);
    }
  }

  // Questions.

  readBody() {
    const topK = find("top-k").valueAsNumber;
    return {
      question: this.question.value,
      context: this.context.value,
      precision: this.form.elements.precision.value,
      top_k: Number.isFinite(topK) ? topK : 3,
      allow_no_answer: find("no-answer").checked,
    };
  }

  async ask() {
    this.work?.abort();
    const work = new AbortController();
    this.work = work;
    this.setBusy(true);
    this.markFields([]);
    showProblem(find("ask-problem"), null);
    const body = this.readBody();
    try {
      const answer = await this.askPatiently(body, work.signal);
      showProblem(find("ask-problem"), null);
      find("no-result").hidden = true;
      this.announce(showResult(find("result"), answer, body.context));
      this.reveal();
      this.onAnswer();
    } catch (error) {
      if (error.name !== "AbortError") {
        this.fail(error);
      } else if (this.work === work) {
        showProblem(find("ask-problem"), null);
        this.announce("Cancelled.");
      }
    } finally {
      if (this.work === work) {
        this.work = null;
        this.setBusy(false);
      }
    }
  }

  /** Ask, and where the service says when to come back, come back; not for ever. */
  async askPatiently(body, signal) {
    for (let tries = 1; ; tries += 1) {
      try {
        return await postAnswer(body, signal);
      } catch (error) {
        if (!error.passes || error.retryAfterS === null || tries === MAX_TRIES) {
          throw error;
        }
        await this.waitOut(error, signal);
      }
    }
  }

  async waitOut(problem, signal) {
    // Seconds count down beside the alert, not in it: it should be read once.
    const countdown = build("p", { class: "countdown", "aria-hidden": "true" });
    const box = find("ask-problem");
    if (box.querySelector(".problem-title")?.textContent !== problem.title) {
      showProblem(box, problem);
    }
    box.querySelector(".countdown")?.remove();
    box.append(countdown);
    for (let left = problem.retryAfterS; left > 0; left -= 1) {
      countdown.textContent = `Asking again in ${left} s`;
      await sleep(1000, signal);
    }
    countdown.textContent = "Asking again";
  }

  cancel() {
    this.work?.abort();
    find("ask").focus();
  }

  fail(error) {
    const problem = error instanceof Problem ? error : new Problem({ title: "This page failed", detail: "Reload it and try again" });
    // What stands there answers another question.
    find("result").hidden = true;
    find("no-result").hidden = true;
    showProblem(find("ask-problem"), problem);
    this.markFields(problem.errors);
    this.reveal();
  }

  /** Mark the inputs that a problem names, and go to the first. */
  markFields(errors) {
    const wrong = new Set(errors.map((error) => FIELDS[error.field]));
    let first = null;
    for (const id of Object.values(FIELDS)) {
      const input = find(id);
      if (wrong.has(id)) {
        input.setAttribute("aria-invalid", "true");
        first ??= input;
      } else {
        input.removeAttribute("aria-invalid");
      }
    }
    if (first !== null) {
      first.closest("details")?.setAttribute("open", "");
      first.focus();
    }
  }

  setBusy(busy) {
    find("ask").textContent = busy ? "Asking…" : "Ask";
    find("cancel").hidden = !busy;
    find("result").setAttribute("aria-busy", String(busy));
  }

  /** Where the answer lies below the form, as on a phone, bring it into view. */
  reveal() {
    const panel = document.querySelector(".answer-panel");
    if (panel.getBoundingClientRect().top > window.innerHeight * 0.6) {
      panel.scrollIntoView({ behavior: prefersLessMotion() ? "instant" : "smooth" });
    }
  }

  announce(text) {
    find("announcement").textContent = text;
  }
}

/** A file's text. Rejects with Problem where it is none. */
async function readText(file) {
  let bytes;
  try {
    bytes = await file.arrayBuffer();
  } catch {
    throw new Problem({ title: "The file cannot be read", detail: "The browser could not open it" });
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Problem({
      title: "Not a text file",
      detail: "The file is not UTF-8 text. Save it as plain text in UTF-8 and open it again",
    });
  }
}
