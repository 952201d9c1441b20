/** Keys. Single ones work while no field has the focus, and can be turned off in the list (key ?). */

import { byId, h } from "./dom.js";
import { store } from "./store.js";

/** `actions`: key -> [what it does, function]. */
export function listen(actions, stop) {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      stop(event);
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || !store.preferences.shortcuts) return;
    if (event.target.closest("input, textarea, select, dialog, [contenteditable]")) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action[1]();
  });
  const always = [["Enter", "Send the message"], ["Shift Enter", "New line"], ["Esc", "Stop the reply, or close what is open"], ["↑", "In an empty field: edit the last message"]];
  const rows = [...always, ...Object.entries(actions).map(([name, [what]]) => [name, what])];
  byId("keys").replaceChildren(...rows.map(([name, what]) =>
    h("tr", {}, h("th", { scope: "row" }, name.split(" ").map((part) => h("kbd", {}, part))), h("td", {}, what))));
  const box = byId("single-keys");
  box.checked = store.preferences.shortcuts;
  box.addEventListener("change", () => store.prefer({ shortcuts: box.checked }));
}
