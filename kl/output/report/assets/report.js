"use strict";
// The theme, the table of responses, and which part the address names. All texts are set as texts.

const read = (name) => JSON.parse(document.getElementById(name).textContent);
const byId = (name) => document.getElementById(name);

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

const nats = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
// Two digits; a limit with Math.ceil, so that it is never written smaller.
function percent(share, rounding) {
  if (share === null || share === undefined) return "–";
  const digit = 10 ** (Math.floor(Math.log10(100 * share)) - 1);
  const value = rounding && share > 0 ? rounding(100 * share / digit - 1e-9) * digit : 100 * share;
  return Number(value.toPrecision(2)) + " %";
}
const inLine = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎");

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
}
const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

const table = read("data-table");
const texts = read("data-texts");
const numberOf = new Map(texts.shown.map((response, number) => [`${response.file}/${response.index}`, number]));

// A column: its head, the value to sort by, what stands in the cell.
const COLUMNS = [
  ["Response", (row) => `${table.file[row]}#${String(table.index[row] ?? -1).padStart(9, "0")}`, nameOf],
  ["KL a token", (row) => (table.infinite[row] ? Infinity : table.kl[row]), (row) => (table.infinite[row] ? "infinite" : nats(table.kl[row]))],
  ["certainly", (row) => table.lower[row], (row) => nats(table.lower[row])],
  ["largest", (row) => table.max[row], (row) => nats(table.max[row])],
  ["same top token", (row) => table.same[row], (row) => percent(table.same[row])],
  ["tokens", (row) => table.n[row], (row) => table.n[row] ?? "–"],
  ["not measured", (row) => table.missing[row], (row) => table.missing[row] || (table.n[row] === null ? "all" : "0")],
  ["why", (row) => table.reason[row], (row) => table.reason[row] ?? ""],
];
const ROWS = 25;
const order = { column: 1, down: true, page: 0, rows: [...Array(table.rows).keys()], wanted: "" };

function nameOf(row) {
  const name = table.index[row] === null ? table.file[row] : `${table.file[row]}#${table.index[row]}`;
  if (table.shown[row] === null) return name;
  const link = element("a", "", name);
  link.href = addressOf(table.file[row], table.index[row], table.at[row] ?? texts.shown[table.shown[row]].first);
  return link;
}

function addressOf(file, index, position) {
  return `#${file.split("/").map(encodeURIComponent).join("/")}/${index}/${position}`;
}

function ranked() {
  const value = COLUMNS[order.column][1];
  const known = (row) => value(row) !== null && value(row) !== undefined;
  const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
  // What is not known stands last, whichever way.
  return order.rows.sort((a, b) => known(b) - known(a) || (order.down ? compare(b, a) : compare(a, b)) || a - b);
}

function matches(row) {
  const wanted = order.wanted;
  if (`${table.file[row]}#${table.index[row]} ${table.reason[row] ?? ""} ${table.finish[row] ?? ""}`.toLowerCase().includes(wanted)) return true;
  const shown = table.shown[row];
  return shown !== null && texts.shown[shown].text.join("").toLowerCase().includes(wanted);
}

function fillTable() {
  const found = ranked().filter(matches);
  const pages = Math.max(1, Math.ceil(found.length / ROWS));
  order.page = Math.min(order.page, pages - 1);
  const body = document.querySelector("#table tbody");
  body.replaceChildren(...found.slice(order.page * ROWS, (order.page + 1) * ROWS).map((row) => {
    const line = element("tr");
    COLUMNS.forEach(([, , cell], number) => {
      const made = element("td", number > 0 && number < 7 ? "number" : "");
      made.append(cell(row));
      line.append(made);
    });
    return line;
  }));
  document.querySelectorAll("#table th").forEach((head, number) => {
    if (number === order.column) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    head.firstChild.textContent = COLUMNS[number][0] + (number !== order.column ? "" : order.down ? " ↓" : " ↑");
  });
  byId("found").textContent = `${found.length} of ${table.rows} responses`;
  byId("page").textContent = `page ${order.page + 1} of ${pages}`;
  byId("before").disabled = order.page === 0;
  byId("after").disabled = order.page === pages - 1;
}

function startTable() {
  document.querySelector("#table thead tr").replaceChildren(...COLUMNS.map(([name], number) => {
    const head = element("th", number > 0 && number < 7 ? "number" : "");
    head.scope = "col";
    const press = element("button", "", name);
    press.type = "button";
    press.addEventListener("click", () => {
      order.down = order.column === number ? !order.down : number > 0 && number < 7;
      order.column = number;
      order.page = 0;
      fillTable();
    });
    head.append(press);
    return head;
  }));
  byId("search").addEventListener("input", (event) => {
    order.wanted = event.target.value.toLowerCase();
    order.page = 0;
    fillTable();
  });
  byId("before").addEventListener("click", () => { order.page -= 1; fillTable(); });
  byId("after").addEventListener("click", () => { order.page += 1; fillTable(); });
  fillTable();
}

// "#a/b.json/2/17" is position 17 of response 2 of the file "a/b.json"; without a position, "#a/b.json/2", the response.
function named(hash) {
  let address;
  try {
    address = decodeURIComponent(hash.slice(1));
  } catch {
    return null; // a stray % in a link from elsewhere
  }
  const whole = /^([^]*)\/(\d+)\/(\d+)$/.exec(address);
  if (whole && numberOf.has(`${whole[1]}/${whole[2]}`)) return { number: numberOf.get(`${whole[1]}/${whole[2]}`), position: Number(whole[3]) };
  return numberOf.has(address) ? { number: numberOf.get(address), position: null } : null;
}
