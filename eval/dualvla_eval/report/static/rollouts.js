// The rollout browser: filters, the list, and which rollouts the player shows. Its whole state is the address after `#`,
// so every view has a link. Data of a rollout is a script loaded when it is first shown: a page opened from disk may
// fetch nothing.
"use strict";

const ROW_PX = 54;
const KEPT = 40; // rollouts in memory
const FILTERS = ["suite", "policy", "task", "success", "stop", "by", "min", "max", "text", "film", "sort"];
const KINDS = { success: "good", failure: "bad", step_limit: "late" };

/** What the data scripts call. */
const report = {
  waiting: new Map(),
  index(data) {
    const entries = data.rows.map((row) => Object.fromEntries(data.columns.map((name, i) => [name, row[i]])));
    for (const entry of entries) {
      entry.color = data.colors[entry.policy];
      entry.kind = KINDS[entry.stop] ?? "fault";
      entry.src = `videos/${encodeURIComponent(entry.id)}.mp4`;
      entry.scene = [entry.suite, entry.task, entry.variant, entry.episode].join("/");
      entry.words = [entry.instruction, entry.failure, entry.id].join(" ").toLowerCase();
    }
    new Browser(entries);
  },
  rollout(id, data) {
    this.waiting.get(id)?.(data);
    this.waiting.delete(id);
  },
};

/** Rollouts by id, the latest ones kept. */
class Store {
  constructor() {
    this.kept = new Map();
  }

  load(id) {
    const found = this.kept.get(id) ?? this.fetch(id);
    this.kept.delete(id);
    this.kept.set(id, found);
    if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    return found;
  }

  fetch(id) {
    return new Promise((resolve, reject) => {
      report.waiting.set(id, resolve);
      const failed = () => reject(new Error(`data/${id}.js is missing or damaged`));
      const script = h("script", { src: `data/${encodeURIComponent(id)}.js`, onerror: failed, onload: () => script.remove() });
      document.head.append(script);
    });
  }
}

/** A listbox of any length: only the rows in sight exist. */
class List {
  constructor(node, choose) {
    Object.assign(this, { node, choose, entries: [], chosen: null });
    this.space = h("div", { role: "presentation", class: "space" });
    node.append(this.space);
    node.addEventListener("scroll", () => this.draw(), { passive: true });
    node.addEventListener("keydown", (event) => this.pressed(event));
    node.addEventListener("click", (event) => {
      const row = event.target.closest("[data-at]");
      if (row) choose(this.entries[Number(row.dataset.at)], true);
    });
    new ResizeObserver(() => this.draw()).observe(node);
  }

  set(entries, chosen) {
    this.entries = entries;
    this.chosen = chosen;
    this.space.style.height = `${entries.length * ROW_PX}px`;
    const at = entries.findIndex((entry) => entry.id === chosen);
    if (at >= 0) this.reveal(at);
    this.draw();
  }

  /** Scrolls as little as needed; to the middle for a row that was far away. */
  reveal(at) {
    const [top, height, now] = [at * ROW_PX, this.node.clientHeight, this.node.scrollTop];
    if (top >= now && top + ROW_PX <= now + height) return;
    if (top < now - height || top > now + 2 * height) this.node.scrollTop = top - height / 2;
    else this.node.scrollTop = top < now ? top : top + ROW_PX - height;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW_PX) - 3);
    const last = Math.min(this.entries.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW_PX) + 3);
    this.space.replaceChildren(...this.entries.slice(first, last).map((entry, i) => this.row(entry, first + i)));
    const here = this.space.querySelector("[aria-selected=true]");
    if (here) this.node.setAttribute("aria-activedescendant", here.id);
    else this.node.removeAttribute("aria-activedescendant");
  }

  row(entry, at) {
    const score = entry.unjudged ? "unjudged" : entry.score === null ? "" : entry.score.toFixed(0);
    const row = h("div", { role: "option", id: `option-${at}`, "data-at": at, "aria-selected": String(entry.id === this.chosen),
      "aria-setsize": this.entries.length, "aria-posinset": at + 1 },
      h("span", { class: "who" }, h("i", { class: `swatch c${entry.color % 12}` }), entry.policy),
      h("span", { class: "what" }, `${entry.task} ${entry.episode}`),
      h("span", { class: "score", title: "VLA Score" }, score),
      h("span", { class: "asked" }, entry.instruction),
      h("span", { class: `how ${entry.kind}` }, entry.video ? h("span", { title: "filmed", class: "dim" }, "▶ ") : null, entry.stop.replaceAll("_", " ")));
    row.style.top = `${at * ROW_PX}px`;
    return row;
  }

  pressed(event) {
    const page = Math.max(1, Math.floor(this.node.clientHeight / ROW_PX) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.entries.length) return;
    event.preventDefault();
    const at = this.entries.findIndex((entry) => entry.id === this.chosen);
    const next = Math.max(0, Math.min(this.entries.length - 1, at < 0 ? 0 : at + moves[event.key]));
    this.choose(this.entries[next], false);
  }
}

/** Those that pass all filters, in the order asked for. */
function select(entries, state) {
  const [min, max] = ["min", "max"].map((name) => (state[name] === undefined || state[name] === "" ? null : Number(state[name])));
  const by = state.by || "score";
  const words = (state.text ?? "").toLowerCase();
  const found = entries.filter((e) =>
    ["suite", "policy", "task", "stop"].every((name) => !state[name] || e[name] === state[name])
    && (!state.success || e.success === (state.success === "yes"))
    && (!state.film || e.video)
    && (min === null || (e[by] !== null && e[by] >= min))
    && (max === null || (e[by] !== null && e[by] <= max))
    && (!words || e.words.includes(words)));
  const [, sign, key] = (state.sort ?? "").match(/^(-?)(score|steps)$/) ?? [];
  if (!key) return found;
  const value = (e) => e[key];
  return found.sort((a, b) => (value(a) === null) - (value(b) === null) || (sign ? value(b) - value(a) : value(a) - value(b)));
}

class Browser {
  constructor(entries) {
    Object.assign(this, { entries, store: new Store(), shown: "" });
    this.byId = new Map(entries.map((entry) => [entry.id, entry]));
    this.form = document.getElementById("filters");
    this.count = document.getElementById("count");
    this.viewer = document.getElementById("viewer");
    this.framePx = Number(document.querySelector("main").dataset.frame);
    this.list = new List(document.getElementById("list"), (entry, push) => this.go({ r: entry.id, step: "" }, push));
    this.fillChoices();
    this.form.addEventListener("input", () => this.filtered());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.go(Object.fromEntries(FILTERS.map((name) => [name, ""])));
    });
    addEventListener("popstate", () => this.render());
    addEventListener("hashchange", () => this.render());
    addEventListener("keydown", (event) => this.pressed(event));
    addEventListener("beforeprint", () => this.player?.panes.forEach((pane) => pane.all.open()));
    this.render();
  }

  fillChoices() {
    for (const name of ["suite", "policy", "task", "stop"]) {
      const values = [...new Set(this.entries.map((e) => e[name]))];
      const select = this.form.elements[name];
      select.append(h("option", { value: "" }, "all"), ...values.map((v) => h("option", { value: v }, v.replaceAll("_", " "))));
      if (name === "suite") select.closest("label").hidden = values.length < 2;
    }
  }

  get state() {
    return Object.fromEntries(readHash());
  }

  /** Changes the address, and with it what is shown. push: the back button returns to before. */
  go(changes, push = false) {
    const params = readHash();
    for (const [name, value] of Object.entries(changes)) {
      if (value === "" || value === null || value === undefined) params.delete(name);
      else params.set(name, value);
    }
    writeHash(params, push);
    this.render();
  }

  filtered() {
    const { elements } = this.form;
    const values = FILTERS.map((name) => [name, elements[name].type === "checkbox" ? (elements[name].checked ? "1" : "") : elements[name].value]);
    const changes = Object.fromEntries(values);
    if (changes.by === "score") changes.by = "";
    this.go(changes);
  }

  pressed(event) {
    if (event.target.closest("input, select, textarea, button, summary, a, [role=listbox]") || event.ctrlKey || event.metaKey || event.altKey || !this.player) return;
    const keys = { " ": () => this.player.toggle(), ArrowLeft: () => this.player.seek(this.player.step - 1), ArrowRight: () => this.player.seek(this.player.step + 1) };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  }

  render() {
    const state = this.state;
    for (const name of FILTERS) {
      const field = this.form.elements[name];
      const value = state[name] ?? (name === "by" ? "score" : "");
      if (field.type === "checkbox") field.checked = value === "1";
      else if (document.activeElement !== field) field.value = value; // never under a person's fingers
    }
    const found = select(this.entries, state);
    const chosen = state.r ?? found[0]?.id;
    this.count.textContent = `${found.length} of ${this.entries.length} rollouts`;
    this.list.set(found, chosen);
    this.show(chosen, state.vs, Number(state.step ?? 0));
  }

  /** Shows a rollout, and the one it is compared with; only the step is moved where both are shown already. */
  async show(id, other, step) {
    const wanted = `${id} ${other ?? ""}`;
    if (wanted === this.shown) {
      if (this.player && !this.player.playing && this.player.step !== step) this.player.seek(step);
      return;
    }
    this.shown = wanted;
    this.player?.pause();
    this.player = null;
    const entries = [id, other].filter(Boolean).map((name) => this.byId.get(name));
    if (!entries.length) return this.say("No rollout passes these filters.");
    if (entries.includes(undefined)) return this.say(`This report holds no rollout '${this.byId.has(id) ? other : id}'.`);
    let rollouts;
    try {
      rollouts = await Promise.all(entries.map((entry) => this.store.load(entry.id)));
    } catch (error) {
      return this.say(String(error.message));
    }
    if (this.shown !== wanted) return; // something else was chosen meanwhile
    const span = Math.max(1, ...rollouts.map((r) => r.steps));
    const seek = (t) => this.player.seek(t);
    const panes = entries.map((entry, i) => new Pane(entry, rollouts[i], { span, framePx: this.framePx, seek }));
    this.player = new Player(panes, { onstep: (t) => this.go({ step: t || "" }) });
    this.viewer.replaceChildren(this.head(entries), this.player.node, h("div", { class: `panes n${panes.length}` }, panes.map((p) => p.node)));
    this.player.time = Math.max(0, Math.min(this.player.steps, step || 0)) / this.player.hz;
    this.player.moveFilms();
    this.player.show();
  }

  say(words) {
    this.viewer.replaceChildren(h("p", { class: "dim empty" }, words));
  }

  head([entry, other]) {
    const peers = this.entries.filter((e) => e.scene === entry.scene && e !== entry);
    const choice = h("select", { onchange: () => this.go({ vs: choice.value }, true) }, h("option", { value: "" }, "nothing"),
      peers.map((e) => h("option", { value: e.id, selected: e === other }, `${e.policy}: ${e.stop.replaceAll("_", " ")}`)));
    const copied = h("button", { type: "button", class: "quiet", onclick: () => this.copyLink(copied) }, "copy link");
    return h("div", { class: "head" }, h("h2", {}, entry.instruction || entry.id),
      h("span", { class: "dim" }, `${entry.suite} / ${entry.task}${entry.variant === "base" ? "" : ` / ${entry.variant}`}, episode ${entry.episode}`),
      h("span", { class: "tools" }, h("label", {}, "compare with ", choice), copied));
  }

  async copyLink(button) {
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "copied";
    } catch {
      button.textContent = "copy it from the address bar"; // the browser forbids it
    }
    setTimeout(() => { button.textContent = "copy link"; }, 2000);
  }
}
