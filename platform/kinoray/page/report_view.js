// The page: sections, filters, the cards of one page, class sheets and corrections. Only one page's cards exist at once.
(() => {
  const { make, name, count } = kinoray;
  const MOST_LISTED = 500;
  const get = (id) => document.getElementById(id);
  const app = { site: null, table: null, corrections: null, query: null, like: null, hash: null, rows: [], shownLabels: new Map(), shownFolders: new Map() };
  const CHOICES = ["status", "label", "true", "verdict", "split", "reason", "codec", "corrected"];
  const RANGES = ["score", "margin", "duration"];
  const MOST_FOLDERS = 2000;
  kinoray.app = app;
  const form = get("controls");
  const list = get("videos");

  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((found) => found.isIntersecting)) {
        observer.unobserve(entry.target);
        if (entry.target.dataset.strip) kinoray.fillStrip(app.site, entry.target);
        else kinoray.fillWindows(app.table, entry.target);
      }
    },
    { rootMargin: "500px" },
  );

  kinoray.say = (text) => {
    get("said").textContent = text;
  };

  // Change the address and show what it says. `replace` leaves no step for the browser's back button.
  kinoray.go = (changes, { replace = false } = {}) => {
    const hash = kinoray.writeQuery({ ...app.query, ...changes });
    if (replace) window.history.replaceState(null, "", hash);
    else window.history.pushState(null, "", hash);
    update();
  };

  const numPages = () => Math.max(1, Math.ceil(app.rows.length / kinoray.PER_PAGE));

  const showSections = (query) => {
    for (const section of document.querySelectorAll("[data-section]")) section.hidden = section.dataset.section !== query.view;
    for (const link of document.querySelectorAll("nav [data-view]")) {
      if (link.dataset.view === query.view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const isClass = query.view === "videos" && query.label !== "";
    if (app.site) document.title = isClass ? `${kinoray.visible(query.label)} - ${app.site.title}` : app.site.title;
  };

  // Filters: from the address to the form and back

  const fillForm = (query) => {
    for (const field of CHOICES) {
      if (form.elements[field]) form.elements[field].value = query[field];
    }
    form.elements.sort.value = query.sort || "margin";
    for (const [field, value] of [["text", query.text], ["folder", kinoray.visible(query.folder)]]) {
      if (document.activeElement !== form.elements[field]) form.elements[field].value = value;
    }
    for (const field of RANGES.filter((name) => form.elements[`${name}-from`])) {
      const [low, high] = kinoray.readRange(query[field]);
      const ends = { from: Number.isFinite(low) ? String(low) : "", to: Number.isFinite(high) ? String(high) : "" };
      for (const end of ["from", "to"]) {
        const input = form.elements[`${field}-${end}`];
        if (document.activeElement !== input) input.value = ends[end];
      }
    }
  };

  const readForm = () => {
    const query = { view: "videos", page: 1, picked: app.query.picked, like: app.query.like };
    for (const field of ["text", "sort", ...CHOICES]) query[field] = form.elements[field]?.value ?? "";
    const folder = form.elements.folder.value.replace(/\/+$/, "");
    query.folder = app.shownFolders.get(folder) ?? folder;
    if (query.sort === "margin") query.sort = "";
    for (const field of RANGES.filter((name) => form.elements[`${name}-from`])) {
      const ends = ["from", "to"].map((end) => form.elements[`${field}-${end}`].value);
      query[field] = ends.some((end) => end !== "") ? ends.join("..") : "";
    }
    return query;
  };

  const fillChoices = (site) => {
    const option = (value) => make("option", { value }, kinoray.visible(value));
    for (const [field, names] of [["label", site.labels], ["true", site.truths ?? site.labels], ["split", site.splits], ["reason", site.reasons], ["codec", app.table.codecs]]) {
      form.elements[field]?.append(...names.map(option));
    }
    for (const label of site.labels) {
      let shown = kinoray.visible(label);
      while (app.shownLabels.has(shown)) shown += " (another)";
      app.shownLabels.set(shown, label);
    }
    get("all-labels").append(...[...app.shownLabels.keys()].map((value) => make("option", { value })));
    const folders = [...new Set(app.table.id.flatMap(kinoray.foldersOf))].sort();
    app.shownFolders = new Map(folders.map((folder) => [kinoray.visible(folder), folder]));
    get("all-folders").append(...folders.slice(0, MOST_FOLDERS).map((folder) => make("option", { value: kinoray.visible(folder) })));
    form.elements.folder.closest("label").hidden = folders.length === 0;
  };

  // The list

  const showPager = (query) => {
    const last = numPages();
    get("pager").hidden = last === 1;
    get("page-number").value = String(query.page);
    get("page-number").max = String(last);
    get("num-pages").textContent = `of ${count(last)}`;
    for (const button of get("pager").querySelectorAll("button")) {
      button.disabled = ["first", "previous"].includes(button.dataset.page) ? query.page === 1 : query.page === last;
    }
  };

  const showList = (query) => {
    app.rows = kinoray.select(app.table, query, app.corrections, query.like === "" ? null : app.like.rows);
    get("like").hidden = query.like === "";
    get("like").querySelector("bdi").textContent = kinoray.visible(app.table.id[app.like?.rows[0]] ?? "a video that is not here");
    query.page = Math.min(query.page, numPages());
    const first = (query.page - 1) * kinoray.PER_PAGE;
    const rows = Array.from(app.rows.slice(first, first + kinoray.PER_PAGE));
    const range = rows.length ? `, ${count(first + 1)} to ${count(first + rows.length)} shown` : "";
    get("matching").textContent = `${count(app.rows.length)} of ${count(app.table.size)} videos match${range}`;
    get("nothing").hidden = app.rows.length > 0;
    observer.disconnect();
    kinoray.stop();
    list.replaceChildren(...rows.map((row) => kinoray.makeCard(app.table, row)));
    list.start = first + 1;
    for (const element of list.querySelectorAll("[data-strip], [data-windows]")) observer.observe(element);
    showChoices();
    kinoray.showPicks();
    showPager(query);
  };

  const showChoices = () => {
    for (const article of document.querySelectorAll("article[data-row]")) kinoray.showChoice(app.table, article, app.corrections);
  };

  // Corrections

  const showCorrections = () => {
    const { corrections } = app;
    get("num-corrections").textContent = count(corrections.size);
    get("no-corrections").hidden = corrections.size > 0;
    get("corrections-box").hidden = corrections.size === 0;
    get("download").disabled = get("clear").disabled = corrections.size === 0;
    const records = [...corrections.records.values()].slice(-MOST_LISTED).reverse();
    const lines = records.map((record) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name(record.video_id)),
        make("td", {}, name(record.predicted)),
        make("td", {}, name(kinoray.spoken(record.label))),
        make("td", { class: "number" }, make("button", { type: "button", class: "plain", "data-key": record.row_key }, "Undo")),
      ),
    );
    get("corrections-list").replaceChildren(...lines);
    get("corrections-more").hidden = records.length === corrections.size;
    get("corrections-more").textContent = `The last ${count(records.length)} of ${count(corrections.size)}; the CSV has all.`;
    const trouble = get("trouble");
    if (corrections.trouble) showTrouble(corrections.trouble);
    else if (trouble.dataset.of === "corrections") trouble.hidden = true;
    if (corrections.trouble) trouble.dataset.of = "corrections";
  };

  // A file that somebody else has downloaded; `undo-load` has things as they were.
  const MOST_BYTES = 50_000_000;
  let loaded = null;

  const loadFile = async (input) => {
    const [file] = input.files;
    if (!file) return;
    let said;
    try {
      if (file.size > MOST_BYTES) throw new Error("it is too large for a file of corrections");
      const found = app.corrections.load(await file.text(), app.table);
      loaded = found.before;
      said = `${count(found.size)} corrections loaded from ${kinoray.visible(file.name)}`;
      if (found.changed) said += `; ${count(found.changed)} of them replace what was said here`;
      if (found.strange) said += `; ${count(found.strange)} are of videos that this site does not list`;
    } catch (error) {
      loaded = null;
      said = `${kinoray.visible(file.name)}: ${error.message}; nothing was loaded`;
    }
    input.value = ""; // so that the same file can be loaded again
    get("loaded").firstElementChild.textContent = said;
    get("loaded").hidden = false;
    get("undo-load").hidden = loaded === null;
  };

  const undoLoad = () => {
    app.corrections.restore(loaded);
    get("loaded").hidden = true;
  };

  const showTrouble = (text) => {
    get("trouble").textContent = text;
    get("trouble").hidden = false;
  };

  kinoray.choose = (article, label) => {
    const row = Number(article.dataset.row);
    app.corrections.choose(app.table, row, label);
    kinoray.say(`${kinoray.visible(app.table.id[row])}: ${kinoray.spoken(label)}`);
  };

  // Add a class to those of a video that may have several, or take it away.
  kinoray.toggle = (article, label) => {
    const row = Number(article.dataset.row);
    const chosen = app.corrections.chosen(app.table.key[row]);
    const now = kinoray.inList(chosen === null || chosen === kinoray.BAD ? app.table.said(row) ?? "|" : chosen);
    kinoray.choose(article, kinoray.asList(now.includes(label) ? now.filter((name) => name !== label) : [...now, label]));
  };

  kinoray.undo = (article) => app.corrections.undo(app.table.key[Number(article.dataset.row)]);

  const clicked = (event) => {
    const button = event.target.closest("button");
    const article = event.target.closest("article");
    const mark = event.target.closest("[data-window]");
    if (mark) kinoray.showWindow(app.table, article, mark.dataset.window);
    if (event.target.matches("[data-pick]")) kinoray.pick(article, event.shiftKey);
    if (!button || !article) return;
    const row = Number(article.dataset.row);
    const isPressed = button.getAttribute("aria-pressed") === "true";
    if (app.site.truths && button.dataset.answer) {
      kinoray.toggle(article, app.site.labels[app.table.top[row][Number(button.dataset.answer)]]);
    } else if (button.dataset.confirm !== undefined) kinoray.choose(article, app.table.said(row) ?? "|");
    else if (button.dataset.play !== undefined) kinoray.togglePlay(app.table, article);
    else if (button.dataset.copy !== undefined) kinoray.copy(app.table, article, button);
    else if (button.dataset.undo !== undefined || isPressed) kinoray.undo(article);
    else if (button.dataset.bad !== undefined) kinoray.choose(article, kinoray.BAD);
    else if (button.dataset.answer) kinoray.choose(article, app.site.labels[app.table.top[row][Number(button.dataset.answer)]]);
  };

  const typed = (event) => {
    const input = event.target;
    const article = input.closest("article");
    if (input.matches(".windows select")) kinoray.showWindow(app.table, article, input.value);
    if (!article || !input.matches(".correction input") || input.value === "") return;
    const label = app.shownLabels.get(input.value);
    input.setCustomValidity(label === undefined ? "There is no such class; choose one of the list." : "");
    if (label === undefined) {
      input.reportValidity();
      return;
    }
    if (app.site.truths) kinoray.toggle(article, label);
    else kinoray.choose(article, label);
    input.value = "";
  };

  const turn = (where) => {
    const page = { first: 1, previous: app.query.page - 1, next: app.query.page + 1, last: numPages() }[where];
    kinoray.turnTo(page);
  };

  kinoray.turnTo = (page) => {
    const wanted = Math.min(Math.max(1, page), numPages());
    if (wanted === app.query.page) return false;
    kinoray.go({ page: wanted });
    form.scrollIntoView({ block: "start" });
    return true;
  };

  const findLike = async (key) => {
    try {
      app.like = { key, rows: (await kinoray.like(app.table, key)) ?? [] };
    } catch (error) {
      showTrouble(error.message);
      return;
    }
    if (app.query.like !== key) return;
    update();
    form.scrollIntoView({ block: "start" }); // what is alike is at the top, wherever the button was
  };

  const update = () => {
    const query = kinoray.readQuery(window.location.hash);
    app.query = query;
    app.hash = window.location.hash;
    showSections(query);
    kinoray.stop();
    if (app.table && query.view === "map") kinoray.showMap();
    if (!app.table || query.view !== "videos") return;
    if (query.like !== "" && app.like?.key !== query.like) {
      findLike(query.like);
      return;
    }
    fillForm(query);
    kinoray.showSheet(app.table, query, get("sheet"));
    showList(query);
  };

  const changed = () => {
    if (window.location.hash !== app.hash) update(); // both events come where one would do
  };

  const listen = () => {
    window.addEventListener("hashchange", changed);
    window.addEventListener("popstate", changed);
    form.addEventListener("input", () => kinoray.go(readForm(), { replace: true }));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => kinoray.go({ ...readForm(), picked: "", like: "" })));
    for (const cards of document.querySelectorAll(".cards")) {
      cards.addEventListener("click", clicked);
      cards.addEventListener("change", typed);
    }
    get("pager").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) turn(button.dataset.page);
    });
    get("page-number").addEventListener("change", (event) => kinoray.turnTo(Number(event.target.value) || 1));
    get("load").addEventListener("change", (event) => loadFile(event.target));
    get("undo-load").addEventListener("click", undoLoad);
    get("download").addEventListener("click", () => app.corrections.download());
    get("clear").addEventListener("click", () => {
      if (window.confirm(`Forget ${count(app.corrections.size)} corrections?`)) app.corrections.clear();
    });
    get("corrections-list").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) app.corrections.undo(button.dataset.key);
    });
    window.addEventListener("beforeunload", (event) => {
      if (app.corrections.trouble && app.corrections.size) event.preventDefault();
    });
  };

  kinoray.start = async () => {
    showSections(kinoray.readQuery(window.location.hash));
    window.addEventListener("hashchange", () => showSections(kinoray.readQuery(window.location.hash)));
    try {
      app.site = await kinoray.load("site");
      const chunks = await Promise.all(Array.from({ length: app.site.rows }, (_, index) => kinoray.load(`rows-${index}`)));
      const loads = Array.from({ length: app.site.media ? app.site.rows : 0 }, (_, index) => kinoray.load(`media-${index}`));
      app.table = kinoray.makeTable(app.site, chunks, await Promise.all(loads));
    } catch (error) {
      get("matching").textContent = "";
      showTrouble(error.message);
      return;
    }
    app.corrections = new kinoray.Corrections(app.site.digest);
    app.corrections.listeners.push(showCorrections, showChoices);
    fillChoices(app.site);
    showCorrections();
    listen();
    kinoray.listenBulk();
    update();
    document.body.dataset.ready = "yes";
  };
})();
