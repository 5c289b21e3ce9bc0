// The gateway's routes, as promises; every failure is a Problem that can be shown.

/** What went wrong, in the words of problem details (RFC 9457) or in ours. */
export class Problem extends Error {
  constructor({ status = 0, title, detail = "", errors = [], retryAfterS = null, instance = "" }) {
    super(title);
    Object.assign(this, { status, title, detail, errors, retryAfterS, instance });
  }

  /** Whether the same request may well succeed a little later. */
  get passes() {
    return this.status === 429 || this.status === 503;
  }
}

/** The window's event when the service asks for an API key, or for another one. */
export const KEY_WANTED = "keywanted";

let apiKey = "";

/** Send an API key from now on. It is never stored: a reload forgets it. */
export function useKey(key) {
  apiKey = key;
}

const UNREACHABLE = {
  title: "The gateway cannot be reached",
  detail: "No answer came from this page’s address. Check that the service runs and the network is up.",
};

/** Fetch JSON of this origin; rejects with Problem, or AbortError when cancelled. */
export async function fetchJson(path, options = {}) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw translate(error);
  }
}

/** Fetch text of this origin. */
export async function fetchText(path, options = {}) {
  const response = await send(path, options);
  try {
    return await response.text();
  } catch (error) {
    throw translate(error);
  }
}

/** Ask one question; `body` is that of POST /v1/answer. */
export function postAnswer(body, signal) {
  return fetchJson("v1/answer", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

async function send(path, options) {
  let response;
  const headers = apiKey === "" ? options.headers : { ...options.headers, Authorization: `Bearer ${apiKey}` };
  try {
    // Relative, so that the page also works behind a path prefix.
    response = await fetch(path, { cache: "no-cache", ...options, headers });
  } catch (error) {
    throw translate(error);
  }
  if (response.status === 401 || response.status === 403) {
    window.dispatchEvent(new Event(KEY_WANTED));
  }
  if (!response.ok) {
    throw await readProblem(response);
  }
  return response;
}

function translate(error) {
  if (error.name === "AbortError") {
    return error;
  }
  if (error instanceof SyntaxError) {
    return new Problem({
      title: "Unreadable answer",
      detail: "What came back is not JSON; something between this page and the gateway may have answered.",
    });
  }
  return new Problem(UNREACHABLE);
}

async function readProblem(response) {
  const { status } = response;
  const retryAfterS = readRetryAfter(response.headers.get("Retry-After"));
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not ours: a proxy's page, say.
  }
  if (typeof body?.title !== "string") {
    const title = `The request failed with status ${status}`;
    const detail = "The answer holds no explanation; something between this page and the gateway may have given it.";
    return new Problem({ status, title, detail, retryAfterS });
  }
  const errors = Array.isArray(body.errors)
    ? body.errors.map((error) => ({ field: String(error.field), message: String(error.message) }))
    : [];
  return new Problem({
    status,
    title: body.title,
    detail: String(body.detail ?? ""),
    errors,
    retryAfterS,
    instance: String(body.instance ?? ""),
  });
}

/** Seconds of a Retry-After header, 1 to 60; null without one. */
function readRetryAfter(header) {
  if (header === null) {
    return null;
  }
  const seconds = /^\d+$/.test(header.trim())
    ? Number(header)
    : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(60, Math.max(1, Math.ceil(seconds))) : null;
}
