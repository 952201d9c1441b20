/** Puts the page together: views, drawers, theme, the state of the server, and the way between them. */

import { Composer } from "./composer.js";
import { connection } from "./connection.js";
import { Dashboard } from "./dashboard.js";
import { announce, byId, icon, toast } from "./dom.js";
import { bytes, loadFacts, modelFacts, plain } from "./facts.js";
import { runner } from "./runner.js";
import { askKey, Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { listen } from "./shortcuts.js";
import { store } from "./store.js";
import { Thread } from "./thread.js";

for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));

const thread = new Thread();
const composer = new Composer(thread);
const settings = new Settings();
const dashboard = new Dashboard();
const sidebar = new Sidebar((id) => open(id));
const narrow = matchMedia("(max-width: 860px)");

// ---- conversations and views

/** Shows a conversation; null shows an empty one, which is kept once something is said. */
function open(id) {
  const conversation = (id && store.get(id)) || (fresh() ?? store.create());
  thread.show(conversation);
  settings.show(conversation);
  sidebar.draw(conversation.id);
  store.prefer({ last: conversation.id });
  closeDrawers();
  show("chat");
  if (!narrow.matches) byId("text").focus();
}

const fresh = () => (thread.conversation && !thread.conversation.messages.length ? thread.conversation : null);

function show(view) {
  for (const name of ["chat", "dashboard"]) byId(name).hidden = name !== view;
  byId("open-dashboard").setAttribute("aria-current", view === "dashboard" ? "page" : "false");
  dashboard.show(view === "dashboard");
  const hash = view === "dashboard" ? "#/dashboard" : "#";
  if (location.hash !== hash && (location.hash || hash !== "#")) history.replaceState(null, "", hash);
  document.title = view === "dashboard" ? "Dashboard · Herdling" : "Herdling";
  if (view === "dashboard") {
    closeDrawers();
    byId("dashboard-title").focus();
  }
}

byId("open-dashboard").addEventListener("click", () => show("dashboard"));
byId("close-dashboard").addEventListener("click", () => open(thread.conversation.id));
addEventListener("hashchange", () => show(location.hash === "#/dashboard" ? "dashboard" : "chat"));
store.addEventListener("full", () => toast("The browser's storage is full: delete some conversations, or export them first."));
store.addEventListener("elsewhere", ({ detail: id }) => {
  if (runner.running(id)) return;
  store.forget(id);
  if (id === thread.conversation.id && store.get(id)) {
    thread.show(store.get(id));
    settings.show(store.get(id));
  }
});
for (const name of ["progress", "end"]) {
  runner.addEventListener(name, ({ detail }) => detail.conversation === thread.conversation && composing());
}

function composing() {
  const running = runner.running(thread.conversation.id);
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  document.body.classList.toggle("replying", running);
}

// ---- drawers

const DRAWERS = { sidebar: "menu", settings: "open-settings" };

function drawer(name, opened) {
  byId(name).classList.toggle("opened", opened);
  byId(DRAWERS[name]).setAttribute("aria-expanded", String(opened));
  byId("shade").hidden = !Object.keys(DRAWERS).some((one) => byId(one).classList.contains("opened"));
  if (opened) byId(name).querySelector("button, input, textarea")?.focus();
}

function closeDrawers() {
  let was = false;
  for (const name of Object.keys(DRAWERS)) {
    if (!byId(name).classList.contains("opened")) continue;
    was = true;
    const inside = byId(name).contains(document.activeElement);
    drawer(name, false);
    if (inside) byId(DRAWERS[name]).focus();
  }
  return was;
}

for (const [name, button] of Object.entries(DRAWERS)) {
  byId(button).addEventListener("click", () => {
    const opened = !byId(name).classList.contains("opened");
    closeDrawers();
    drawer(name, opened);
  });
}
byId("shade").addEventListener("click", closeDrawers);
for (const button of document.querySelectorAll(".close-drawer")) button.addEventListener("click", closeDrawers);

// ---- theme

const dark = matchMedia("(prefers-color-scheme: dark)");

function themed() {
  const now = store.preferences.theme || (dark.matches ? "dark" : "light");
  byId("theme").replaceChildren(icon(now === "dark" ? "sun" : "moon"));
  byId("theme").title = now === "dark" ? "Light colours" : "Dark colours";
  byId("theme").setAttribute("aria-label", byId("theme").title);
}

function turnTheme() {
  const now = store.preferences.theme || (dark.matches ? "dark" : "light");
  store.prefer({ theme: now === "dark" ? "light" : "dark" });
  document.documentElement.dataset.theme = store.preferences.theme;
  themed();
}

byId("theme").addEventListener("click", turnTheme);
dark.addEventListener("change", themed);
themed();

// ---- the server

const SAID = {
  gone: "The server does not answer. What you write is kept; this page tries again by itself.",
  loading: "The server is loading its model. You can write already; sending works in a moment.",
  key: "The server wants an API key.",
  broken: "The server answers, but has a problem:",
};
let before = "asking";

function server() {
  const { state, message, facts } = connection;
  const banner = byId("banner");
  banner.hidden = !SAID[state];
  banner.className = state;
  byId("banner-text").textContent = state === "broken" ? `${SAID.broken} ${message}` : (SAID[state] ?? "");
  byId("banner-key").hidden = state !== "key";
  if (state !== before) {
    if (state === "key" && before === "asking") askKey();
    if (SAID[state]) announce(byId("banner-text").textContent);
    if (state === "ok" && SAID[before]) announce("The server is back.");
    before = state;
  }
  if (state === "ok") meter(loadFacts(facts), modelFacts(facts));
}

function meter(load, model) {
  const parts = [];
  if (load.newRate) parts.push(`${plain(load.newRate, load.newRate < 10 ? 1 : 0)} tokens/s`);
  if (load.memory !== null) parts.push(bytes(load.memory));
  byId("meter").textContent = parts.join(" · ");
  byId("meter").title = "What the server writes now, for everybody, and the memory of its process";
  byId("welcome-model").textContent = model.image ? "Write to the model, or show it a picture." : "Write to the model.";
}

byId("banner-key").addEventListener("click", askKey);
connection.addEventListener("change", server);

// ---- keys and the beginning

listen({
  "/": ["Write a message", () => { show("chat"); byId("text").focus(); }],
  n: ["New conversation", () => open(null)],
  "[": ["Previous conversation", () => sidebar.step(-1)],
  "]": ["Next conversation", () => sidebar.step(1)],
  j: ["Next message", () => thread.step(1)],
  k: ["Previous message", () => thread.step(-1)],
  e: ["Edit the last message", () => thread.editLast()],
  r: ["Regenerate the last reply", () => thread.regenerate()],
  d: ["Dashboard, and back", () => (byId("dashboard").hidden ? show("dashboard") : open(thread.conversation.id))],
  ",": ["Settings", () => drawer("settings", !byId("settings").classList.contains("opened"))],
  t: ["Light or dark", turnTheme],
  "?": ["This list", () => byId("help-dialog").showModal()],
}, (event) => {
  if (closeDrawers()) event.preventDefault();
  else if (thread.running) {
    thread.stop();
    byId("text").focus();
  }
});
byId("help").addEventListener("click", () => byId("help-dialog").showModal());

const wantsDashboard = location.hash === "#/dashboard";
open(store.preferences.last);
if (wantsDashboard) show("dashboard");
composing();
connection.start();
