// The API key, where the service asks for one: typed in, kept in this tab's memory only.

import { find } from "./dom.js";
import { KEY_WANTED, useKey } from "./gateway.js";

/** The field for the key; shows itself when the service asks. */
export class KeyForm {
  constructor(onKey) {
    const form = find("key-form");
    const input = find("key");
    window.addEventListener(KEY_WANTED, () => {
      form.hidden = false;
      // A link sends no key.
      for (const link of document.querySelectorAll("[data-keyed]")) {
        link.hidden = true;
      }
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      useKey(input.value.trim());
      input.value = "";
      form.hidden = true;
      onKey();
    });
  }
}
