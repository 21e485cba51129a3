// Videos that are selected, on whatever page of the list they are, and what is said of all of them at once.
(() => {
  const { count } = kinoray;
  const get = (id) => document.getElementById(id);
  const picked = new Set();
  let lastRow = null;
  let undo = null;

  // Checkboxes and counts as the selection is now.
  kinoray.showPicks = () => {
    const { rows, table } = kinoray.app;
    for (const article of document.querySelectorAll("article[data-row]")) {
      const isPicked = picked.has(Number(article.dataset.row));
      article.classList.toggle("picked", isPicked);
      article.querySelector("[data-pick]").checked = isPicked;
    }
    const hidden = picked.size - rows.reduce((sum, row) => sum + picked.has(row), 0);
    const elsewhere = hidden ? `${count(hidden)} of them not in this list` : "";
    for (const element of document.querySelectorAll(".num-picked")) {
      element.textContent = `${count(picked.size)} of ${count(table.size)} selected`;
    }
    get("picked-elsewhere").textContent = elsewhere;
    get("pick-all").textContent = `Select all ${count(rows.length)} that match`;
    get("pick-all").disabled = rows.length === 0;
    kinoray.drawMap();
    for (const id of ["pick-none", "bulk-bad", "bulk-label", "bulk-undo-picked"]) get(id).disabled = picked.size === 0;
  };

  kinoray.isPicked = (row) => picked.has(row);

  kinoray.pickRows = (rows) => {
    for (const row of rows) picked.add(row);
    kinoray.showPicks();
  };

  // Select a card, or no more; with shift, all of the list from the last one on.
  kinoray.pick = (article, isRange) => {
    const row = Number(article.dataset.row);
    const wanted = !picked.has(row);
    const { rows } = kinoray.app;
    const ends = [rows.indexOf(row), isRange && lastRow !== null ? rows.indexOf(lastRow) : -1].sort((a, b) => a - b);
    for (const each of ends[0] < 0 ? [row] : rows.slice(ends[0], ends[1] + 1)) {
      if (wanted) picked.add(each);
      else picked.delete(each);
    }
    lastRow = row;
    kinoray.showPicks();
  };

  const done = (text, before) => {
    undo = before;
    get("bulk-said").hidden = false;
    get("bulk-said").firstElementChild.textContent = text;
    kinoray.say(text);
    picked.clear();
    kinoray.showPicks();
  };

  // Say a label of all that are selected; of what could not be read only that it is bad.
  const sayOfAll = (label) => {
    const { table, corrections, site } = kinoray.app;
    const isBad = label === kinoray.BAD;
    const rows = [...picked].filter((row) => isBad || table.statuses[table.status[row]] === "labelled");
    const labelOf = (row) => {
      if (isBad || !site.truths) return label;
      const chosen = corrections.chosen(table.key[row]);
      const now = chosen === null || chosen === kinoray.BAD ? table.said(row) ?? "|" : chosen;
      return kinoray.asList([...kinoray.inList(now), label]); // a class more, where a video may have several
    };
    const left = picked.size - rows.length;
    const leftOut = left ? `; ${count(left)} without an answer left out` : "";
    done(`${count(rows.length)} videos: ${kinoray.spoken(label)}${leftOut}`, corrections.chooseAll(table, rows, labelOf));
  };

  const typed = (event) => {
    const input = event.target;
    if (input.value === "") return;
    const label = kinoray.app.shownLabels.get(input.value);
    input.setCustomValidity(label === undefined ? "There is no such class; choose one of the list." : "");
    if (label === undefined) {
      input.reportValidity();
      return;
    }
    input.value = "";
    sayOfAll(label);
  };

  const undoPicked = () => {
    const { table, corrections } = kinoray.app;
    const rows = [...picked].filter((row) => corrections.has(table.key[row]));
    const before = new Map(rows.map((row) => [table.key[row], corrections.records.get(table.key[row])]));
    corrections.restore(new Map(rows.map((row) => [table.key[row], undefined])));
    done(`${count(rows.length)} corrections taken back`, before);
  };

  kinoray.listenBulk = () => {
    get("pick-all").addEventListener("click", () => kinoray.pickRows(kinoray.app.rows));
    get("pick-none").addEventListener("click", () => {
      picked.clear();
      kinoray.showPicks();
    });
    get("bulk-label").addEventListener("change", typed);
    get("bulk-bad").addEventListener("click", () => sayOfAll(kinoray.BAD));
    get("bulk-undo-picked").addEventListener("click", undoPicked);
    get("bulk-undo").addEventListener("click", () => {
      kinoray.app.corrections.restore(undo);
      get("bulk-said").hidden = true;
    });
  };
})();
