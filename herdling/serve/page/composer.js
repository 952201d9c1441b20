/** Where a message is written: text that grows, pictures by button, paste or drop, send and stop. */

import { connection } from "./connection.js";
import { announce, byId, h, iconButton, toast } from "./dom.js";
import { modelFacts } from "./facts.js";
import { showPicture } from "./message.js";
import { readPicture } from "./pictures.js";
import { describe, tiledPicture, tiling } from "./tiles.js";

const MOST = 8;

export class Composer {
  constructor(thread) {
    this.thread = thread;
    this.images = [];
    this.field = byId("text");
    this.field.addEventListener("input", () => this.#changed());
    this.field.addEventListener("keydown", (event) => this.#key(event));
    this.field.addEventListener("paste", (event) => this.#paste(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => {
      this.thread.stop();
      this.field.focus();
    });
    byId("attach").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", ({ target }) => {
      this.add([...target.files]);
      target.value = "";
    });
    this.#drops();
    connection.addEventListener("change", () => this.#able());
    this.#changed();
  }

  send() {
    const text = this.field.value.trim();
    if (this.thread.running || (!text && !this.images.length)) return;
    const { images } = this;
    this.images = [];
    this.field.value = "";
    this.#changed();
    this.thread.send(text, images);
  }

  async add(files) {
    if (!this.#sees()) return toast("This model reads text only; it cannot take pictures.");
    for (const file of files) {
      if (this.images.length >= MOST) return toast(`At most ${MOST} pictures go into a message.`);
      try {
        this.images.push(await readPicture(file));
        announce(`${file.name || "Picture"} added.`);
      } catch (error) {
        toast(error.message);
      }
    }
    this.#changed();
    this.field.focus();
  }

  #sees() {
    return !connection.facts || Boolean(modelFacts(connection.facts).image);
  }

  #able() {
    const sees = this.#sees();
    byId("attach").disabled = !sees;
    byId("attach").title = sees ? "Add pictures" : "This model reads text only";
    if (this.images.length && !this.tiled) this.#changed();
  }

  #changed() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, innerHeight * 0.4)}px`;
    byId("send").disabled = !this.field.value.trim() && !this.images.length;
    this.tiled = Boolean(connection.facts);
    const list = byId("attached");
    list.hidden = !this.images.length;
    list.replaceChildren(...this.images.map((image, i) => this.#thumbnail(image, i)));
  }

  #thumbnail(image, i) {
    const vision = modelFacts(connection.facts).image;
    const remove = () => {
      this.images.splice(i, 1);
      this.#changed();
      this.field.focus();
    };
    return h("li", {},
      h("button", { type: "button", class: "picture-button", "aria-label": `Show ${image.name} with its tiles`, onclick: () => showPicture(image) }, tiledPicture(image, vision)),
      h("span", { class: "name", title: image.name }, image.name),
      h("small", {}, vision ? describe(tiling(image.width, image.height, vision)) : `${image.width} × ${image.height}`),
      iconButton("close", `Remove ${image.name}`, remove, { class: "quiet remove" }));
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.field.value) {
      event.preventDefault();
      this.thread.editLast();
    }
  }

  #paste(event) {
    const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    this.add(files);
  }

  #drops() {
    const zone = byId("chat");
    const carries = (event) => event.dataTransfer?.types.includes("Files");
    for (const name of ["dragenter", "dragover"]) {
      zone.addEventListener(name, (event) => {
        if (!carries(event)) return;
        event.preventDefault();
        zone.classList.add("dropping");
      });
    }
    zone.addEventListener("dragleave", (event) => {
      if (!zone.contains(event.relatedTarget)) zone.classList.remove("dropping");
    });
    zone.addEventListener("drop", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      zone.classList.remove("dropping");
      this.add([...event.dataTransfer.files]);
    });
  }
}
