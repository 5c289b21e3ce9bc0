// Elements from data. Text only ever becomes text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

/** An HTML element; children are nodes or strings, null and undefined are left out. */
export function build(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) {
      continue;
    }
    if (typeof value === "function") {
      node.addEventListener(name, value);
    } else {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A term and its description, for a list of them. */
export const describe = (term, ...description) => [
  build("dt", {}, term),
  build("dd", {}, ...description),
];

export const NAMES = { int8: "INT8", fp16: "FP16", fp32: "FP32", both: "Both" };
export const nameOf = (precision) => NAMES[precision] ?? String(precision).toUpperCase();

/** Milliseconds with three significant digits at most: 0.42 ms, 12.1 ms, 1 240 ms. */
export function formatMs(ms) {
  if (ms === null || ms === undefined) {
    return "–";
  }
  const digits = ms < 1 ? 2 : ms < 100 ? 1 : 0;
  return `${groupDigits(ms, digits)} ms`;
}

export const formatRatio = (ratio) => (typeof ratio === "number" ? `${ratio.toFixed(2)}×` : "–");

export function formatShare(share) {
  if (typeof share !== "number") {
    return "–";
  }
  const percent = share * 100;
  return `${Number.isInteger(percent) || percent > 99.95 ? percent.toFixed(0) : percent.toFixed(1)} %`;
}

/** A number with thousands set apart. */
export function groupDigits(number, digits = 0) {
  return number.toLocaleString("en-GB", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

export function count(number, noun, plural = `${noun}s`) {
  return `${groupDigits(number)} ${number === 1 ? noun : plural}`;
}

export const prefersLessMotion = () =>
  window.matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Resolve after some milliseconds, or reject as soon as the signal aborts. */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
