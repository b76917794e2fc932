// The text of a response, its tokens shaded, and both lists of the token that is pointed at.

const ratio = (a, b) => (a === null || a === undefined || !(b > 0) ? null : a / b);
const minus = (value) => (value === null || value === undefined ? null : -value);
const at = (response, name, i) => response[name]?.[i] ?? null;
const NATS = [0.01, 0.03, 0.1, 0.3, 1, 3];
const SURPRISE = [0.5, 1, 2, 3, 5, 8];

// What the shade says: its name, its value at a token, where each shade begins.
const MEASURES = [
  { name: "KL, estimate (nats)", of: (r, i) => at(r, "kl", i), from: NATS },
  { name: "KL, certain (lower bound, nats)", of: (r, i) => at(r, "lower", i), from: NATS },
  { name: "KL by the sum of both entropies", of: (r, i) => ratio(at(r, "kl", i), at(r, "hp", i) + at(r, "hq", i)), from: NATS },
  { name: "Δp of the token: Q less P", of: (r, i) => at(r, "dp", i), from: [0.02, 0.1, 0.3], signed: true },
  { name: "surprise under P (−log p, nats)", of: (r, i) => minus(at(r, "lp", i)), from: SURPRISE },
  { name: "surprise under Q (−log q, nats; at least)", of: (r, i) => minus(at(r, "lq", i)), from: SURPRISE },
];
const WORDS = { i: "infinite KL", x: "not measured", s: "left out by position sampling", b: "bounds only" };

const now = { number: null, token: null, kept: null, measure: 0, height: 0 };
let lists; // read when first needed: they are most of the file

function shadeOf(measure, value) {
  if (value === null) return "unknown";
  const level = measure.from.filter((start) => Math.abs(value) >= start).length;
  if (!measure.signed) return level ? `s${level}` : "";
  return level ? (value < 0 ? `s${2 * level}` : `g${level}`) : "";
}

function kindOf(response, i) {
  const state = response.state[i];
  if (state === "x") return "t missing";
  if (state === "s") return "t left-out";
  const shade = shadeOf(MEASURES[now.measure], MEASURES[now.measure].of(response, i));
  return `t ${state === "i" ? "infinite " : ""}${shade}`;
}

function sayOf(response, i) {
  const state = response.state[i];
  const measure = MEASURES[now.measure];
  const value = state === "m" || state === "b" ? `${measure.name}: ${nats(measure.of(response, i))}` : WORDS[state];
  return `${inLine(response.text[i])}, position ${response.first + i}, ${value}`;
}

function drawToken(response, i) {
  const made = element("span", kindOf(response, i));
  made.id = `t${i}`;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  made.setAttribute("aria-label", sayOf(response, i));
  const parts = response.text[i].split(/(\n|⟨[^⟩]*⟩|⇥|␍)/);
  for (const part of parts) {
    if (part === "\n") made.append(element("span", "sign", "⏎"), "\n");
    else if (/^(⟨[^⟩]*⟩|⇥|␍)$/.test(part)) made.append(element("span", "sign", part));
    else if (part) made.append(part);
  }
  if (response.stop.includes(i)) made.append(element("span", "sign", "■"));
  return made;
}

function drawLegend() {
  const measure = MEASURES[now.measure];
  const entry = (kind, words) => element("span", `t ${kind}`, words);
  const steps = measure.signed
    ? [...measure.from].reverse().map((start, i) => entry(`s${2 * (measure.from.length - i)}`, `≤ −${start}`))
        .concat(entry("", "near 0"), measure.from.map((start, i) => entry(`g${i + 1}`, `≥ +${start}`)))
    : [entry("", `< ${measure.from[0]}`), ...measure.from.map((start, i) => entry(`s${i + 1}`, `≥ ${start}`))];
  const response = texts.shown[now.number];
  const others = [["x", "missing", "not measured"], ["s", "left-out", "left out by sampling"], ["i", "infinite", "infinite"]]
    .filter(([state]) => response.state.includes(state)).map(([, kind, words]) => entry(kind, words));
  if (response.state.split("").some((state, i) => "mb".includes(state) && measure.of(response, i) === null)) others.push(entry("unknown", "not known"));
  byId("legend").replaceChildren(...steps, ...others);
}

function show(number) {
  const response = texts.shown[number];
  now.number = number;
  now.token = now.kept = null;
  byId("reader").hidden = false;
  byId("reader-head").textContent = `${response.file}#${response.index}`;
  const part = response.text.length < response.n ? `Positions ${response.first} to ${response.first + response.text.length - 1} of ${response.n}. ` : "";
  const row = table.shown.indexOf(number);
  byId("reader-about").textContent = `${part}KL ${table.infinite[row] ? "infinite" : nats(table.kl[row])} nats a token, certainly ${nats(table.lower[row])}. Shown as: ${response.why}.`;
  const prompt = texts.prompts[response.file];
  byId("prompt").hidden = prompt === undefined;
  byId("prompt").querySelector(".text").textContent = prompt ?? "";
  byId("text").replaceChildren(...response.text.map((_, i) => drawToken(response, i)));
  drawLegend();
}

function shadeAll() {
  const response = texts.shown[now.number];
  [...byId("text").children].forEach((token, i) => {
    token.className = kindOf(response, i) + (i === now.token ? " now" : "");
    token.setAttribute("aria-label", sayOf(response, i));
  });
  drawLegend();
}

function choose(i, keep) {
  const response = texts.shown[now.number];
  const token = byId("text").children[i];
  if (!token) return;
  const before = byId("text").children[now.token];
  if (before) { before.classList.remove("now"); before.setAttribute("aria-selected", "false"); }
  token.classList.add("now");
  token.setAttribute("aria-selected", "true");
  byId("text").setAttribute("aria-activedescendant", token.id);
  now.token = i;
  const address = addressOf(response.file, response.index, response.first + i);
  byId("address").href = address;
  if (keep) {
    now.kept = i;
    history.replaceState(null, "", address);
  }
  drawLists(response, i);
}

function drawLists(response, i) {
  const position = response.first + i;
  const lines = [element("h3", "", `${inLine(response.text[i])}  ·  position ${position}${at(response, "ids", i) === null ? "" : `  ·  id ${response.ids[i]}`}`)];
  const say = (text) => lines.push(element("p", "", text));
  const state = response.state[i];
  if (state !== "m") say(WORDS[state] + (at(response, "reasons", i) === null ? "." : `: ${texts.reasons[response.reasons[i]]}`));
  if (at(response, "kl", i) !== null || at(response, "lower", i) !== null) {
    const exact = at(response, "exact", i);
    const least = `certainly ${nats(at(response, "lower", i))}`;
    if (state === "i") say(`By the lists alone ${least} nats.`);
    else say(`KL ${nats(at(response, "kl", i))} nats; ${least}, plausibly at most ${nats(at(response, "upper", i))}${exact === null ? "" : `, exact ${nats(exact)}`}.`);
  }
  const p = at(response, "lp", i), q = at(response, "lq", i);
  const massOfQ = () => (response.atMost[i] === "1" ? `at most ${percent(Math.exp(q), Math.ceil)}` : percent(Math.exp(q)));
  if (p !== null) say(`P gave this token ${percent(Math.exp(p))}, Q ${q === null ? "–" : massOfQ()}. Entropy ${nats(at(response, "hp", i))} and ${nats(at(response, "hq", i))} nats.`);
  if (at(response, "flags", i) !== null) say(`To know of the lists: ${response.flags[i]}.`);
  lines.push(bothLists(response, i, position));
  const panel = byId("lists");
  panel.replaceChildren(...lines);
  // It never shrinks: the page would scroll another token under the pointer.
  if (panel.offsetHeight > now.height) panel.style.minHeight = `${now.height = panel.offsetHeight}px`;
}

function bothLists(response, i, position) {
  lists ??= read("data-lists");
  if (lists === null) return element("p", "muted", "This run kept no lists (candidates.parquet).");
  const place = `${now.number}/${position}`;
  const entries = lists.places[place];
  if (!entries) return element("p", "muted", response.state[i] === "s" ? "Nothing was asked here." : "The lists of this position are not in this file, or there are none; candidates.parquet has what there is.");
  const rows = [];
  const mass = (value) => (value === null ? null : Math.exp(-value / 1000));
  for (let k = 2; k < entries.length; k += 3) {
    const [text, id, idQ] = lists.vocabulary[entries[k]];
    const [p, q] = [mass(entries[k + 1]), mass(entries[k + 2])];
    rows.push({ text, id: idQ === undefined ? id : `${id} / ${idQ}`, p, q, said: text === response.text[i] });
  }
  rows.sort((a, b) => Math.max(b.p ?? 0, b.q ?? 0) - Math.max(a.p ?? 0, a.q ?? 0));
  const limits = { p: mass(entries[0]), q: mass(entries[1]) };
  const made = element("table", "both");
  made.append(element("caption", "", "Both lists, the most probable first. Hatched: not in that list, and at most what stands there."));
  const head = element("tr");
  for (const [kind, name] of [["p", "P"], ["token", "token"], ["q", "Q"]]) {
    const cell = element("th", kind, name);
    cell.scope = "col";
    head.append(cell);
  }
  made.append(element("thead"), element("tbody"));
  made.tHead.append(head);
  for (const row of rows) {
    const line = element("tr", row.said ? "said" : "");
    const token = element("td", "token");
    token.append(element("code", "", (row.said ? "▸ " : "") + inLine(row.text)));
    if (row.id !== null) token.append(element("span", "id", `id ${row.id}`));
    line.append(side("p", row.p, limits.p), token, side("q", row.q, limits.q));
    made.tBodies[0].append(line);
  }
  const rest = element("tr");
  const others = element("td", "token", "all others");
  if (lists.more[place]) others.append(element("span", "id", `${lists.more[place]} listed ones among them`));
  // Of a list that is shown in part, what is not shown has all that the shown ones leave.
  const left = (name, unlisted) => (lists.more[place] && limits[name] !== null ? Math.max(unlisted ?? 0, 1 - rows.reduce((sum, row) => sum + (row[name] ?? 0), 0)) : unlisted);
  rest.append(element("td", "side p", percent(left("p", at(response, "rp", i)))), others, element("td", "side q", percent(left("q", at(response, "rq", i)))));
  made.tBodies[0].append(rest);
  return made;
}

// A bar and its mass; hatched where the side does not list the token, whose mass is then at most its smallest one.
function side(name, mass, limit) {
  const cell = element("td", `side ${name}`);
  const row = element("span", "row");
  const bar = element("span", mass === null ? "absent" : `bar of-${name}`);
  if (mass !== null) bar.style.width = `${70 * mass}%`;
  row.append(bar, element("span", "", mass !== null ? percent(mass) : limit !== null ? `≤ ${percent(limit, Math.ceil)}` : "no list"));
  cell.append(row);
  return cell;
}

function nextLargest() {
  const response = texts.shown[now.number];
  const measure = MEASURES[now.measure];
  const size = (i) => (response.state[i] === "i" ? Infinity : Math.abs(measure.of(response, i) ?? -1));
  const ranked = [...response.text.keys()].filter((i) => size(i) >= 0 && "mbi".includes(response.state[i])).sort((a, b) => size(b) - size(a) || a - b);
  if (ranked.length) move(ranked[(ranked.indexOf(now.token) + 1) % ranked.length]);
}

function move(i) {
  choose(i, true);
  byId("text").children[i]?.scrollIntoView({ block: "nearest" });
}

// The token above or below: of the next line, the nearest one.
function vertical(step) {
  const tokens = byId("text").children;
  const here = tokens[now.token].getBoundingClientRect();
  let best = now.token, line = null, distance = Infinity;
  for (let i = now.token + step; tokens[i]; i += step) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 6) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 6) break;
    if (Math.abs(box.left - here.left) < distance) { distance = Math.abs(box.left - here.left); best = i; }
  }
  return best;
}

function pressed(event) {
  const last = byId("text").children.length - 1;
  const from = now.token ?? 0;
  const steps = { ArrowRight: () => from + 1, ArrowLeft: () => from - 1, Home: () => 0, End: () => last,
    ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), Enter: () => from, " ": () => from };
  if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  move(Math.min(Math.max(steps[event.key](), 0), last));
}

function startReader() {
  byId("measure").replaceChildren(...MEASURES.map(({ name }, number) => {
    const option = element("option", "", name);
    option.value = number;
    return option;
  }));
  byId("measure").addEventListener("change", (event) => { now.measure = Number(event.target.value); shadeAll(); });
  byId("largest").addEventListener("click", nextLargest);
  const text = byId("text");
  const tokenOf = (event) => [...text.children].indexOf(event.target.closest(".t"));
  text.addEventListener("mouseover", (event) => { const i = tokenOf(event); if (i >= 0) choose(i, false); });
  text.addEventListener("mouseleave", () => { if (now.kept !== null) choose(now.kept, false); });
  text.addEventListener("click", (event) => { const i = tokenOf(event); if (i >= 0) choose(i, true); });
  text.addEventListener("keydown", pressed);
  window.addEventListener("hashchange", () => go(true));
}

function largestOf(response) {
  const size = (i) => (response.state[i] === "i" ? Infinity : at(response, "kl", i) ?? -1);
  return [...response.text.keys()].reduce((best, i) => (size(i) > size(best) ? i : best), 0);
}

function go(jump) {
  const target = named(location.hash);
  if (!target) return false;
  if (target.number !== now.number) show(target.number);
  const response = texts.shown[target.number];
  const i = target.position === null ? largestOf(response) : target.position - response.first;
  if (response.text[i] === undefined) {
    byId("lists").replaceChildren(element("p", "", `Position ${target.position} is not in this file.`));
  } else {
    choose(i, true);
  }
  if (jump) {
    byId("reader").scrollIntoView();
    byId("text").children[i]?.scrollIntoView({ block: "nearest" });
    byId("text").focus({ preventScroll: true });
  }
  return true;
}

startTable();
startReader();
if (!go(true) && texts.shown.length) {
  show(0);
  choose(largestOf(texts.shown[0]), false);
  now.kept = now.token;
}
