/** The list of conversations: open, rename, delete with a way back, export and import as JSON. */

import { byId, h, icon, iconButton, toast } from "./dom.js";
import { runner } from "./runner.js";
import { store } from "./store.js";

export class Sidebar {
  /** `open(id)` shows a conversation; null begins a new one. */
  constructor(open) {
    this.open = open;
    this.current = "";
    byId("new").addEventListener("click", () => open(null));
    byId("export-all").addEventListener("click", () => save(store.export(), "herdling-conversations.json"));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", ({ target }) => this.#import(target));
    store.addEventListener("change", () => this.draw());
    for (const name of ["progress", "end"]) runner.addEventListener(name, () => this.#mark());
    this.draw();
  }

  draw(current = this.current) {
    this.current = current;
    const list = store.list();
    byId("conversations").replaceChildren(...list.map((item) => this.#item(item)));
    byId("export-all").disabled = !list.length;
    this.#mark();
  }

  /** Opens the conversation before (-1) or after (1) the current one. */
  step(direction) {
    const list = store.list();
    const next = list[list.findIndex(({ id }) => id === this.current) + direction];
    if (next) this.open(next.id);
  }

  #mark() {
    for (const node of byId("conversations").children) node.classList.toggle("busy", runner.running(node.dataset.id));
  }

  #item({ id, title }) {
    const name = title || "New conversation";
    const item = h("li", { "data-id": id, class: id === this.current ? "current" : null },
      h("button", { type: "button", class: "open", title: name, "aria-current": id === this.current ? "page" : null, onclick: () => this.open(id) }, name),
      h("span", { class: "tools" },
        iconButton("edit", `Rename ${name}`, () => this.#rename(item, id, name)),
        iconButton("download", `Export ${name}`, () => save(store.export([id]), "herdling-conversation.json")),
        iconButton("trash", `Delete ${name}`, () => this.#remove(id))));
    return item;
  }

  #rename(item, id, name) {
    const field = h("input", { value: name, "aria-label": "Name of the conversation", maxlength: "200" });
    const done = (keep) => {
      const conversation = store.get(id);
      if (keep && field.value.trim() && conversation) {
        conversation.title = field.value.trim();
        store.save(conversation);
      } else this.draw();
      byId("conversations").querySelector(`[data-id="${id}"] .open`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      field.onblur = null;
      done(event.key === "Enter");
    });
    field.onblur = () => done(true);
    item.replaceChildren(field);
    field.select();
    field.focus();
  }

  #remove(id) {
    runner.stop(id);
    const gone = store.remove(id);
    if (id === this.current) this.open(null);
    toast("Conversation deleted.", () => {
      store.save(gone);
      this.open(gone.id);
    });
    byId("new").focus();
  }

  async #import(target) {
    const [file] = target.files;
    target.value = "";
    if (!file) return;
    try {
      const found = store.import(await file.text());
      toast(found === 1 ? "1 conversation was added." : `${found} conversations were added.`);
    } catch (error) {
      toast(`${file.name} was not imported: ${error.message}.`);
    }
  }
}

function save(text, name) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name }, icon("download"));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
