// A problem, shown: its title, its explanation, the fields it names.

import { build } from "./dom.js";

/**
 * Show a problem in a container; null clears it. Returns nothing.
 * `actions` are buttons that stand below it.
 */
export function showProblem(container, problem, actions = []) {
  if (problem === null) {
    container.replaceChildren();
    return;
  }
  // The detail is often a field's message over again, or the list of them in one line.
  const fields = problem.errors.filter((error) => error.message !== problem.detail);
  const isListed = fields.length > 0 && fields.every((error) => problem.detail.includes(error.message));
  container.replaceChildren(
    build(
      "div",
      { class: problem.passes ? "problem passing" : "problem", role: "alert" },
      build("p", { class: "problem-title" }, problem.title),
      problem.detail && !isListed ? build("p", {}, sentence(problem.detail)) : null,
      fields.length > 0
        ? build(
            "dl",
            { class: "faults" },
            fields.map((error) => [
              build("dt", {}, error.field),
              build("dd", {}, error.message),
            ]).flat(),
          )
        : null,
      problem.instance
        ? build("p", { class: "hint" }, "Request ", build("code", {}, problem.instance))
        : null,
    ),
    ...actions,
  );
}

/** The service's messages start small and end open; on a page they are sentences. */
function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}
