// Plays one rollout, or two side by side: film, view from above, tracks, what is said and done at the step, the verdict.
// Knows the data of a rollout (`rollouts.py`), nothing of the list or the address. Every text is set as text.
"use strict";

/** An element. Attributes starting with "on" are listeners; children are elements or texts. */
function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const fixed = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
const PARTS = { R: "reasoning", A: "action", I: "intention", RA: "alignment" };
const UNITS = { _m: ["mm", 1000, 0], _rad: ["°", 180 / Math.PI, 1], _open: ["", 1, 2] };

/** "dx_m" -> its label, unit, factor and digits. */
function dimension(name) {
  const suffix = Object.keys(UNITS).find((ending) => name.endsWith(ending));
  const [unit, factor, digits] = UNITS[suffix] ?? ["", 1, 3];
  return { label: (suffix ? name.slice(0, -suffix.length) : name).replaceAll("_", " "), unit, factor, digits };
}

/** The text in force at a step: [since when, text], or null before the first one. */
function textAt(rollout, step) {
  let found = null;
  for (const [since, text] of rollout.texts) {
    if (since > step) break;
    found = [since, text];
  }
  return found;
}

// --- what does not change while it plays -----------------------------------------------------------------------------

/** The scene from above: x away from the robot points up, y to its left points left. */
class Map2D {
  constructor(rollout) {
    this.rollout = rollout;
    const points = [...rollout.tool.map(([x, y]) => [x, y]), ...rollout.objects.flatMap((o) => o.path)];
    const size = 0.03;
    const [minX, maxX] = [Math.min(...points.map((p) => p[0])) - size, Math.max(...points.map((p) => p[0])) + size];
    const [minY, maxY] = [Math.min(...points.map((p) => p[1])) - size, Math.max(...points.map((p) => p[1])) + size];
    this.scale = 200 / Math.max(maxX - minX, maxY - minY, 0.1);
    this.origin = [(minX + maxX) / 2, (minY + maxY) / 2];
    this.trail = svg("path", { class: "trail" });
    this.tool = svg("circle", { r: 5, class: "tool" });
    this.things = rollout.objects.map((object) => {
      const known = object.color !== null && CSS.supports("color", object.color);
      const shape = svg("rect", { x: -9, y: -9, width: 18, height: 18, rx: 4, fill: known ? object.color : "gray", class: "thing" }, svg("title", {}, object.name));
      return { object, node: svg("g", {}, shape, svg("text", { y: 22 }, object.name)) };
    });
    const whole = svg("path", { class: "path", d: this.line(rollout.tool) });
    this.node = svg("svg", { viewBox: "-125 -125 250 250", class: "map", role: "img", "aria-label": "the tool's way, seen from above" },
      ...this.things.map((t) => t.node), whole, this.trail, this.tool,
      svg("text", { x: -118, y: -112, class: "corner" }, "from above"), svg("text", { x: 0, y: 119 }, "robot"));
  }

  at([x, y]) {
    return [-(y - this.origin[1]) * this.scale, -(x - this.origin[0]) * this.scale];
  }

  line(points) {
    return points.length ? `M${points.map((p) => this.at(p).map((v) => v.toFixed(1)).join(" ")).join("L")}` : "";
  }

  show(step) {
    const tool = this.rollout.tool;
    const now = Math.min(step, tool.length - 1);
    this.trail.setAttribute("d", this.line(tool.slice(0, now + 1)));
    const [x, y] = this.at(tool[now]);
    this.tool.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
    for (const { object, node } of this.things) {
      const [ox, oy] = this.at(object.path[Math.min(now, object.path.length - 1)]);
      node.setAttribute("transform", `translate(${ox.toFixed(1)} ${oy.toFixed(1)})`);
    }
  }
}

/** Thoughts, speed, gripper and events over the steps; a click seeks. span: steps of the longest rollout shown. */
class Tracks {
  constructor(rollout, span, seek) {
    this.span = span;
    this.head = h("div", { class: "playhead" });
    const speeds = rollout.tool.slice(1).map((p, t) => 1000 * Math.hypot(...p.map((v, i) => v - rollout.tool[t][i])));
    const fastest = Math.max(...speeds, 1);
    this.node = h("div", { class: "tracks", onclick: (event) => seek(this.stepOf(event)) },
      this.track("texts", "a block is a text in force, its mark where it was newly written", this.thoughts(rollout)),
      this.track(`speed, to ${fastest.toFixed(0)} mm`, "distance the tool moved in each step",
        [svg("path", { class: "speed", d: `M0 10${speeds.map((v, t) => `L${t} ${(10 - 9 * v / fastest).toFixed(2)}h1`).join("")}V10Z` })]),
      this.track("gripper", "up is open", rollout.gripper.length ? rollout.gripper[0].map((_, arm) =>
        svg("path", { class: "gripper", d: `M${rollout.gripper.map((g, t) => `${t} ${(9 - 8 * g[arm]).toFixed(2)}h1`).join("L")}` })) : []),
      h("div", { class: "track events" }, h("span", { class: "name" }, "events"),
        h("div", { class: "lane" }, rollout.events.map(([t, event]) => {
          const mark = h("i", { title: `${event}, step ${t}` });
          mark.style.left = `${100 * (t + 0.5) / span}%`;
          return mark;
        }))),
      h("div", { class: "cursor" }, this.head));
  }

  track(name, title, shapes) {
    return h("div", { class: "track", title }, h("span", { class: "name" }, name),
      svg("svg", { viewBox: `0 0 ${this.span} 10`, preserveAspectRatio: "none", "aria-hidden": true }, shapes));
  }

  thoughts(rollout) {
    const ends = [...rollout.texts.slice(1).map(([t]) => t), rollout.steps];
    const blocks = rollout.texts.map(([since, text], i) =>
      text === null ? null : svg("rect", { x: since, y: 3, width: ends[i] - since, height: 6, class: "said" }, svg("title", {}, text)));
    return [...blocks, ...rollout.fresh.map((t) => svg("path", { class: "fresh", d: `M${t} 0V10` }))];
  }

  stepOf(event) {
    const lane = this.head.parentElement.getBoundingClientRect();
    return Math.floor(this.span * (event.clientX - lane.left) / lane.width);
  }

  show(step) {
    this.head.style.left = `${100 * Math.min(step, this.span) / this.span}%`;
  }
}

/** The judge's marks with every reason, its own words, and Eq. 8 with the numbers put in. */
function verdictOf(entry, rollout) {
  const score = rollout.score;
  if (score === null) return h("p", { class: "dim" }, "Not judged.");
  const by = h("span", { class: "dim" }, `judged by ${score.judge}`);
  if (score.unjudged) return h("div", { class: "verdict" }, h("h4", {}, "Unjudged ", by), h("p", {}, score.unjudged));
  const marks = Object.keys(PARTS).filter((part) => score[part] !== null).map((part) => [
    h("dt", {}, h("b", {}, part), ` ${PARTS[part]}`),
    h("dd", {}, h("meter", { min: 0, max: 10, value: score[part], "aria-label": PARTS[part] }), h("b", {}, fixed(score[part])),
      h("ul", {}, (score.reasons[part] ?? []).map((reason) =>
        h("li", {}, h("b", {}, `${reason.points < 0 ? "−" : "+"}${Math.abs(reason.points).toFixed(1)}`), ` ${reason.name} `, h("span", { class: "dim" }, reason.detail))))),
  ]);
  return h("div", { class: "verdict" },
    h("h4", {}, `VLA Score ${fixed(100 * score.score)} `, by),
    h("p", { class: "equation" }, equation(score, entry.success)),
    score.silent ? h("p", { class: "late" }, "A reasoning policy that said nothing here: R = RA = 0.") : null,
    h("dl", {}, marks),
    score.rationale ? [h("h4", {}, "The judge's words"), h("p", { class: "words" }, score.rationale)] : null,
    score.examples.length ? h("p", { class: "dim" }, `Shown as examples: ${score.examples.join(", ")}`) : null,
    score.judge_success === null ? null : h("p", { class: "dim" }, `The judge took it for a ${score.judge_success ? "success" : "failure"} (recorded only).`));
}

function equation(score, success) {
  const [r, a, i, ra] = ["R", "A", "I", "RA"].map((part) => fixed(score[part] === null ? null : score[part] / 10, 2));
  const product = score.R === null ? `${a} · ${i}` : `((${r} + ${a} · ${i}) / 2) · ${ra}`;
  return `Eq. 8: ${score.R === null ? "A · I · B" : "((R + A · I) / 2) · RA · B"} = ${product} · ${success ? 1 : 0} = ${fixed(score.score, 3)}`;
}

/** Every step as a table, made when it is first opened. */
class StepTable {
  constructor(rollout, seek) {
    Object.assign(this, { rollout, seek });
    this.node = h("details", { class: "steps", ontoggle: () => this.fill() }, h("summary", {}, `All ${rollout.steps} steps`));
  }

  open() {
    this.node.open = true;
    this.fill();
  }

  fill() {
    if (!this.node.open || this.node.querySelector("table")) return;
    const { rollout } = this;
    const fresh = new Set(rollout.fresh);
    const rows = Array.from({ length: rollout.steps }, (_, t) => h("tr", { "data-step": t },
      h("th", { scope: "row" }, h("button", { type: "button", onclick: () => this.seek(t), "aria-label": `go to step ${t}` }, String(t))),
      h("td", { class: "words" }, fresh.has(t) ? textAt(rollout, t)?.[1] ?? "" : ""),
      h("td", {}, actionText(rollout, t)), h("td", {}, rollout.gripper[t].map((g) => g.toFixed(2)).join(" ")),
      h("td", {}, rollout.events.filter(([at]) => at === t).map(([, event]) => h("code", {}, event, " ")))));
    this.node.append(h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "all steps" }, h("table", {},
      h("thead", {}, h("tr", {}, ["step", "newly said", "action", "gripper", "events"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows))));
  }

  show(step) {
    for (const row of this.node.querySelectorAll("tr.now-row")) row.classList.remove("now-row");
    this.node.querySelector(`tr[data-step="${step}"]`)?.classList.add("now-row");
  }
}

function actionText(rollout, step) {
  return rollout.dimensions.map((name, i) => {
    const { label, unit, factor, digits } = dimension(name);
    return `${label} ${fixed(rollout.actions[step][i] * factor, digits)}${unit}`;
  }).join(", ");
}

// --- one rollout -----------------------------------------------------------------------------------------------------

/** entry: its row of the index. framePx: side of the camera's picture in a film; what is under it repeats this page. */
class Pane {
  constructor(entry, rollout, { span, framePx, seek }) {
    Object.assign(this, { entry, rollout, last: -1 });
    this.film = entry.video ? this.makeFilm(framePx) : null;
    this.map = rollout.tool.length ? new Map2D(rollout) : null;
    this.tracks = new Tracks(rollout, span, seek);
    this.said = h("p", { class: "words said" });
    this.since = h("span", { class: "dim" });
    this.values = rollout.dimensions.map((name) => this.makeValue(name));
    this.happened = h("span", {});
    this.all = new StepTable(rollout, seek);
    this.node = h("article", { class: "pane", "aria-label": `${entry.policy}, episode ${entry.episode}` },
      h("header", {}, h("h3", {}, h("i", { class: `swatch c${entry.color % 12}` }), entry.policy),
        h("span", { class: `badge ${entry.kind}` }, entry.stop.replaceAll("_", " ")), entry.failure ? h("span", {}, entry.failure) : null,
        h("span", { class: "dim" }, `${entry.steps} steps`)),
      rollout.steps === 0 ? h("p", {}, "Nothing was recorded.") : h("div", { class: `scene ${this.film ? "filmed" : ""}` },
        h("div", { class: "stage" }, this.film ? h("div", { class: "film" }, this.film) : null, this.map?.node),
        this.tracks.node,
        h("div", { class: "now" },
          h("section", { "aria-label": "reasoning in force" }, h("h4", {}, "Says ", this.since), this.said),
          h("section", { "aria-label": "action of the step" }, h("h4", {}, "Does"), h("dl", { class: "action" }, this.values.map((v) => h("div", {}, h("dt", {}, v.label), v.node)))),
          h("p", { class: "happened" }, this.happened))),
      verdictOf(entry, rollout),
      rollout.steps ? this.all.node : null);
  }

  makeFilm(framePx) {
    const film = h("video", { src: this.entry.src, muted: true, playsinline: true, preload: "auto", "aria-label": `film of ${this.entry.policy}` });
    film.muted = true;
    film.addEventListener("loadedmetadata", () => {
      if (film.videoWidth === framePx && film.videoHeight > framePx) film.classList.add("cropped");
    });
    return film;
  }

  makeValue(name) {
    const { label, unit, factor, digits } = dimension(name);
    const column = this.rollout.dimensions.indexOf(name);
    const most = Math.max(1e-9, ...this.rollout.actions.map((a) => Math.abs(a[column])));
    const bar = h("i", { class: "bar" });
    const number = h("span", {});
    const set = (value) => {
      number.textContent = value === null ? "–" : `${fixed(value * factor, digits)} ${unit}`;
      const share = value === null ? 0 : value / most;
      bar.style.width = `${50 * Math.abs(share)}%`;
      bar.style.left = `${share < 0 ? 50 * (1 + share) : 50}%`;
    };
    return { label, set, node: h("dd", {}, h("span", { class: "track" }, bar), number) };
  }

  /** Shows step `step` of T; T itself is where the last action led. */
  show(step) {
    if (step === this.last || this.rollout.steps === 0) return;
    this.last = step;
    const t = Math.min(step, this.rollout.steps - 1);
    const ended = step >= this.rollout.steps;
    this.map?.show(step);
    this.tracks.show(step);
    const [since, text] = textAt(this.rollout, t) ?? [0, null];
    const fresh = this.rollout.fresh.includes(t) && !ended;
    this.said.textContent = text ?? "nothing";
    this.said.classList.toggle("none", text === null);
    this.since.textContent = text === null ? "" : fresh ? "newly written at this step" : `since step ${since}`;
    this.node.classList.toggle("thinking", fresh);
    this.values.forEach((value, i) => value.set(ended ? null : this.rollout.actions[t][i]));
    const events = this.rollout.events.filter(([at]) => at === t).map(([, event]) => event);
    const gripper = this.rollout.gripper[Math.min(step, this.rollout.gripper.length - 1)].map((g) => g.toFixed(2)).join(", ");
    const wait = ended ? null : this.rollout.infer_ms[t];
    this.happened.textContent = ended ? `ended: ${this.entry.failure ?? this.entry.stop.replaceAll("_", " ")}`
      : `gripper ${gripper} open${wait === null ? "" : `; the policy was asked and took ${fixed(wait)} ms`}${events.length ? `; ${events.join(", ")}` : ""}`;
    this.all.show(t);
  }
}

// --- the clock they share --------------------------------------------------------------------------------------------

/** Panes in step. `onstep(step)` is called when the user, not the clock, moved it. */
class Player {
  constructor(panes, { onstep }) {
    Object.assign(this, { panes, onstep, time: 0, playing: false, rate: 1 });
    this.hz = panes[0].rollout.hz;
    this.steps = Math.max(...panes.map((p) => p.rollout.steps));
    this.lead = panes.filter((p) => p.film).sort((a, b) => b.rollout.steps - a.rollout.steps)[0]?.film;
    this.button = h("button", { type: "button", class: "play", onclick: () => this.toggle(), "aria-label": "play" }, "▶");
    this.range = h("input", { type: "range", min: 0, max: this.steps, step: 1, value: 0, "aria-label": "step", oninput: () => this.seek(Number(this.range.value)) });
    this.readout = h("output", { class: "readout" });
    const speed = h("select", { "aria-label": "speed", onchange: () => this.setRate(Number(speed.value)) },
      [0.25, 0.5, 1, 2, 4].map((r) => h("option", { value: r, selected: r === 1 }, `${r}×`)));
    this.node = h("div", { class: "controls" }, this.button,
      h("button", { type: "button", onclick: () => this.seek(this.step - 1), "aria-label": "one step back" }, "‹"),
      h("button", { type: "button", onclick: () => this.seek(this.step + 1), "aria-label": "one step on" }, "›"),
      this.range, this.readout, speed);
    this.show();
  }

  get step() {
    return Math.min(this.steps, Math.max(0, Math.floor(this.time * this.hz + 1e-6)));
  }

  seek(step) {
    this.pause();
    this.time = Math.max(0, Math.min(this.steps, step)) / this.hz;
    this.moveFilms();
    this.show();
    this.onstep(this.step);
  }

  toggle() {
    if (this.playing) {
      this.pause();
      this.onstep(this.step);
    } else {
      this.play();
    }
  }

  play() {
    if (this.step >= this.steps) this.time = 0;
    this.playing = true;
    this.moveFilms();
    this.setRate(this.rate);
    for (const { film } of this.panes) film?.play().catch(() => this.pause()); // a film that will not play stops the clock
    this.button.textContent = "⏸";
    this.button.setAttribute("aria-label", "pause");
    this.before = null;
    requestAnimationFrame((now) => this.tick(now));
  }

  pause() {
    this.playing = false;
    for (const { film } of this.panes) film?.pause();
    this.button.textContent = "▶";
    this.button.setAttribute("aria-label", "play");
  }

  setRate(rate) {
    this.rate = rate;
    for (const { film } of this.panes) if (film) film.playbackRate = rate;
  }

  /** A film shows one control step a frame; half a frame in, no rounding can show its neighbour. */
  moveFilms() {
    for (const pane of this.panes) {
      if (pane.film) pane.film.currentTime = (Math.min(this.step, pane.rollout.steps) + 0.5) / this.hz;
    }
  }

  tick(now) {
    if (!this.playing || !this.node.isConnected) return;
    const film = this.lead;
    if (film && !film.ended && film.readyState >= 2) this.time = film.currentTime; // what is seen leads
    else if (this.before !== null) this.time += this.rate * (now - this.before) / 1000;
    this.before = now;
    this.show();
    if (this.step >= this.steps) {
      this.pause();
      this.onstep(this.step);
    } else {
      requestAnimationFrame((later) => this.tick(later));
    }
  }

  show() {
    this.panes.forEach((pane) => pane.show(this.step));
    this.range.value = this.step;
    this.range.setAttribute("aria-valuetext", `step ${this.step} of ${this.steps}`);
    this.readout.textContent = `${this.step} / ${this.steps}  ·  ${(this.step / this.hz).toFixed(1)} s`;
  }
}
