"use strict";

const POLL_MS = 1000;
const LABEL_PX = 64; // room for "≤ 1000 ms"
const at = (id) => document.getElementById(id);
let chosen = null;
let camera = "";
let shown = null; // object URL of the frame on view
const history = []; // of the latency counts: [time in ms, stages]

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer;
}

async function post(path, reason) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ reason }),
  });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
}

function tell(message) {
  at("banner").hidden = !message;
  at("banner").textContent = message;
}

function seconds(value) {
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

function showStop(stop) {
  at("state").textContent = stop.stopped ? "stopped" : "running";
  at("state").className = `state ${stop.stopped ? "bad" : "ok"}`;
  at("stop").hidden = stop.stopped;
  at("clear").hidden = !stop.stopped;
  tell(stop.stopped ? `Emergency stop: ${stop.reason || "no reason was given"}. No robot gets an action.` : "");
}

function showModels(models) {
  at("models").textContent = models
    .map((m) => `${m.name} ${m.version}${m.state === "ready" ? "" : ` (${m.state}${m.message ? `: ${m.message}` : ""})`}`)
    .join(", ");
}

function cell(row, text, kind = "") {
  const data = row.insertCell();
  data.textContent = text;
  data.className = kind;
}

function showSessions(sessions) {
  const connected = sessions.filter((s) => s.connected).length;
  at("count").textContent = sessions.length ? `${connected} connected, ${sessions.length - connected} away` : "";
  at("none").hidden = sessions.length > 0;
  const focused = document.activeElement?.dataset?.session;
  const body = document.createElement("tbody");
  body.id = "sessions";
  for (const session of [...sessions].sort((a, b) => (a.id < b.id ? -1 : 1))) {
    const row = body.insertRow();
    row.tabIndex = 0;
    row.dataset.session = session.id;
    row.className = `${session.id === chosen ? "chosen" : ""} ${session.connected ? "" : "gone"}`;
    row.addEventListener("click", () => choose(session.id));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(session.id); });
    cell(row, session.id.length > 24 ? `${session.id.slice(0, 23)}…` : session.id);
    cell(row, session.instruction ?? "", "long");
    cell(row, session.model ?? "");
    cell(row, session.seq, "number");
    cell(row, session.last_ms == null ? "" : session.last_ms.toFixed(1), "number");
    cell(row, seconds(session.idle_s), "number");
    const total = typeof session.interventions === "object"
      ? Object.values(session.interventions ?? {}).reduce((sum, n) => sum + n, 0) : session.interventions;
    cell(row, total ?? 0, "number");
  }
  at("sessions").replaceWith(body);
  if (focused) [...body.rows].find((row) => row.dataset.session === focused)?.focus();
  showDetail(sessions.find((s) => s.id === chosen));
}

function choose(id) {
  if (id !== chosen) {
    camera = "";
    showFrame(null);
    at("hint").hidden = false;
    at("hint").textContent = "Waiting for its next frame.";
  }
  chosen = id;
  for (const row of at("sessions").rows) row.classList.toggle("chosen", row.dataset.session === id);
  refreshFrame();
}

function showDetail(session) {
  if (chosen === null) return;
  if (!session) {
    chosen = null;
    showFrame(null);
    at("chosen").textContent = "What a robot sees";
    at("hint").hidden = false;
    at("hint").textContent = "That session has ended. Choose another one.";
    at("reasoning").textContent = at("options").textContent = "";
    return;
  }
  at("chosen").textContent = session.id;
  at("reasoning").textContent = session.reasoning || "(no reasoning)";
  at("options").textContent = [
    session.protocol, `replica ${session.replica}`, `age ${seconds(session.age_s)}`,
    ...Object.entries(session.options ?? {}).map(([name, value]) => `${name}=${value}`),
  ].join(" · ");
}

function showFrame(blob) {
  if (shown) URL.revokeObjectURL(shown);
  shown = blob ? URL.createObjectURL(blob) : null;
  at("frame").hidden = !shown;
  at("camera").hidden = !shown || at("camera").options.length < 2;
  if (shown) at("frame").src = shown;
}

async function refreshFrame() {
  const asked = chosen;
  if (asked === null) return;
  const query = camera ? `?camera=${encodeURIComponent(camera)}` : "";
  const answer = await fetch(`/v1/admin/sessions/${encodeURIComponent(asked)}/frame${query}`, { cache: "no-store" });
  if (asked !== chosen || answer.status !== 200) return; // 202: on its way; 404: ended, which the table shows
  const cameras = (answer.headers.get("X-Cameras") ?? "").split(",").filter(Boolean).map(decodeURIComponent);
  const blob = await answer.blob();
  if (asked !== chosen) return;
  if (at("camera").dataset.of !== cameras.join()) {
    at("camera").dataset.of = cameras.join();
    at("camera").replaceChildren(...cameras.map((name) => new Option(name, name, false, name === camera)));
  }
  at("hint").hidden = true;
  showFrame(blob);
}

function showLatency(stages) {
  const names = Object.keys(stages);
  const select = at("stage");
  if (select.dataset.of !== names.join()) {
    const before = select.value || "total";
    select.dataset.of = names.join();
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === before)));
  }
  history.push([performance.now(), stages]);
  while (history.length > 2 && history[1][0] < performance.now() - 60_000) history.shift();
  drawHistogram();
}

/** Answers in each bucket, from counts that are cumulative over buckets and over time. */
function bucketCounts(stage, sinceStart) {
  const now = history[history.length - 1][1][stage];
  const before = sinceStart ? null : history[0][1][stage];
  const totals = now.counts.map((n, i) => Math.max(0, n - (before?.counts[i] ?? 0)));
  return totals.map((n, i) => n - (i ? totals[i - 1] : 0));
}

function quantile(edges, counts, q) {
  const rank = q * counts.reduce((sum, n) => sum + n, 0);
  let seen = 0;
  for (let i = 0; i < counts.length; i++) {
    if (seen + counts[i] >= rank && counts[i]) {
      const low = i ? edges[i - 1] : 0;
      return i < edges.length && isFinite(edges[i]) ? low + ((edges[i] - low) * (rank - seen)) / counts[i] : low;
    }
    seen += counts[i];
  }
  return 0;
}

function drawHistogram() {
  const stage = at("stage").value;
  const svg = at("histogram");
  svg.replaceChildren();
  if (!history.length || !stage) return;
  const counts = bucketCounts(stage, at("window").value === "0");
  const edges = history[history.length - 1][1][stage].le.map(Number);
  const total = counts.reduce((sum, n) => sum + n, 0);
  at("quiet").hidden = total > 0;
  at("summary").textContent = total
    ? `${total} answers, p50 ${quantile(edges, counts, 0.5).toFixed(1)} ms, p99 ${quantile(edges, counts, 0.99).toFixed(1)} ms`
    : "";
  if (!total) return;
  const first = counts.findIndex((n) => n > 0);
  const last = counts.length - 1 - [...counts].reverse().findIndex((n) => n > 0);
  const from = Math.max(0, first - 1), to = Math.min(counts.length - 1, last + 1);
  const whole = svg.clientWidth, width = whole / (to - from + 1), most = Math.max(...counts);
  for (let i = from; i <= to; i++) {
    const height = (counts[i] / most) * 125, x = (i - from) * width;
    add(svg, "rect", { x: x + 2, y: 145 - height, width: Math.max(1, width - 4), height, rx: 2 });
    const label = i < edges.length && isFinite(edges[i]) ? `≤ ${edges[i]} ms` : "more";
    if ((to - i) % Math.ceil(LABEL_PX / width) === 0) {
      add(svg, "text", { x: x + width / 2, y: 162, "text-anchor": "middle" }, label);
    }
    if (counts[i]) add(svg, "text", { x: x + width / 2, y: 140 - height, "text-anchor": "middle" }, counts[i]);
  }
  add(svg, "line", { x1: 0, y1: 146, x2: whole, y2: 146 });
}

function add(svg, kind, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  svg.append(element);
}

async function refresh() {
  try {
    const paths = ["/v1/admin/stop", "/v1/models", "/v1/admin/sessions", "/v1/admin/latency"];
    const [stop, models, sessions, latency] = await Promise.all(paths.map(async (path) => (await get(path)).json()));
    showStop(stop);
    showModels(models.models);
    showSessions(sessions.sessions);
    showLatency(latency.stages);
    await refreshFrame();
  } catch (error) {
    at("state").textContent = "not answering";
    at("state").className = "state bad";
    tell(`The endpoint does not answer (${error.message}). What is shown is old.`);
  }
  setTimeout(refresh, POLL_MS);
}

async function act(path, question) {
  const reason = prompt(question, "");
  if (reason === null) return;
  try {
    await post(path, reason || "status page");
  } catch (error) {
    tell(`That failed (${error.message}).`);
  }
}

at("stop").addEventListener("click", () => act("/v1/admin/stop", "Stop every robot of this endpoint now. Reason:"));
at("clear").addEventListener("click", () => act("/v1/admin/clear", "Robots will move again. Why is that safe?"));
at("camera").addEventListener("change", () => { camera = at("camera").value; refreshFrame(); });
at("stage").addEventListener("change", drawHistogram);
at("window").addEventListener("change", drawHistogram);
refresh();
