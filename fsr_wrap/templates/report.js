"use strict";
(() => {
  const PAGE = 25, FIRST = 24;
  const at = id => document.getElementById(id);
  const data = JSON.parse(at("rows").textContent);
  const length = data.index.length;
  const name = label => label < 0 ? "" : data.names[label];
  const form = at("filter"), cards = at("cards"), list = at("list");
  const all = cards ? [...cards.children] : [];
  let key = "quality", falls = false, start = 0, shown = FIRST;

  const chosen = id => at(id) && at(id).value !== "" ? Number(at(id).value) : null;
  const fits = (given, suggested) => {
    const one = chosen("given"), other = chosen("suggested");
    return (one === null || one === given) && (other === null || other === suggested);
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  const value = {
    index: i => data.index[i], quality: i => data.quality[i],
    given: i => name(data.given[i]), suggested: i => name(data.suggested[i]),
  };

  function showCards() {
    const order = at("order").value;
    const of = card => order === "given" || order === "suggested" ? name(Number(card.dataset[order])) : Number(card.dataset[order]);
    const sorted = all.map((card, i) => [of(card), i, card]).sort((a, b) => compare(a[0], b[0]) || a[1] - b[1]);
    let number = 0;
    for (const [, , card] of sorted) {
      const good = fits(Number(card.dataset.given), Number(card.dataset.suggested));
      card.hidden = !good || number >= shown;
      number += good;
      cards.append(card);
    }
    at("more").hidden = number <= shown;
    at("no-cards").hidden = number > 0;
  }

  let rows = [];
  function sortRows() {
    rows = [];
    for (let i = 0; i < length; i++) if (fits(data.given[i], data.suggested[i])) rows.push(i);
    const of = value[key], sign = falls ? -1 : 1;
    if (key !== "quality" || falls) rows.sort((a, b) => sign * compare(of(a), of(b)) || a - b);  // they come worst first
    start = 0;
  }

  function showRows() {
    const body = list.tBodies[0], keys = [...list.tHead.rows[0].cells].map(cell => cell.dataset.key);
    body.replaceChildren(...rows.slice(start, start + PAGE).map(i => {
      const row = document.createElement("tr");
      for (const one of keys) {
        const text = one === "quality" ? (data.quality[i] / 1000).toFixed(3) : String(value[one](i));
        row.insertCell().textContent = text;
      }
      return row;
    }));
    for (const cell of list.tHead.rows[0].cells) {
      if (cell.dataset.key === key) cell.setAttribute("aria-sort", falls ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    const say = number => number.toLocaleString("en");
    at("place").textContent = rows.length ? `${say(start + 1)}–${say(Math.min(start + PAGE, rows.length))} of ${say(rows.length)}` : "none";
    at("back").disabled = start === 0;
    at("on").disabled = start + PAGE >= rows.length;
  }

  function filter() {
    shown = FIRST;
    if (cards) showCards();
    sortRows();
    showRows();
  }

  for (const id of ["given", "suggested"]) {
    if (!at(id)) continue;
    const labels = [...new Set(data[id])].filter(label => label >= 0);
    labels.sort((a, b) => compare(name(a), name(b)));
    for (const label of labels) at(id).append(new Option(name(label), label));
    at(id).addEventListener("change", filter);
  }
  for (const cell of list.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    button.addEventListener("click", () => {
      falls = key === cell.dataset.key && !falls;
      key = cell.dataset.key;
      sortRows();
      showRows();
    });
    cell.replaceChildren(button);
  }
  at("order").addEventListener("change", () => { if (cards) showCards(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  if (cards) at("more").addEventListener("click", () => { shown += 2 * FIRST; showCards(); });
  at("back").addEventListener("click", () => { start -= PAGE; showRows(); });
  at("on").addEventListener("click", () => { start += PAGE; showRows(); });
  for (const button of document.querySelectorAll(".matrix button")) {
    button.addEventListener("click", () => {
      at("given").value = button.dataset.given;
      at("suggested").value = button.dataset.suggested;
      filter();
      at("samples").scrollIntoView({behavior: "smooth"});
    });
  }
  form.hidden = at("pages").hidden = false;
  filter();
})();
