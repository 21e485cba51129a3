// Which rows are shown, in which order, and how that is written in the address. No element is touched here.
(() => {
  kinoray.PER_PAGE = 50;
  const FIELDS = ["label", "true", "status", "verdict", "split", "reason", "score", "margin", "duration", "codec", "folder", "text", "corrected", "picked", "like", "sort"];
  const VIEWS = ["overview", "videos", "map", "classes", "quarantine", "corrections"];

  // "#label=cat&page=2" -> {view, page, label, ...}; a filter without a view means the videos.
  kinoray.readQuery = (hash) => {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const query = { page: Math.max(1, Number.parseInt(given.get("page") ?? "1", 10) || 1) };
    for (const field of FIELDS) query[field] = given.get(field) ?? "";
    const isFiltered = FIELDS.some((field) => query[field] !== "") || given.has("page");
    const view = given.get("view") ?? "";
    query.view = VIEWS.includes(view) ? view : isFiltered ? "videos" : "overview";
    return query;
  };

  kinoray.writeQuery = (query) => {
    const given = new URLSearchParams();
    const fields = FIELDS.filter((field) => query[field] !== "" && query[field] !== undefined);
    if (query.view !== "videos" || (!fields.length && query.page === 1)) given.set("view", query.view);
    if (query.view === "videos") {
      for (const field of fields) given.set(field, query[field]);
      if (query.page > 1) given.set("page", String(query.page));
    }
    return `#${given}`;
  };

  // "0.2..0.6" -> [0.2, 0.6]; an end that is missing or no number is open.
  kinoray.readRange = (text) => {
    const [low, high] = text.split("..").map((part) => (part.trim() === "" ? NaN : Number(part)));
    return [Number.isFinite(low) ? low : -Infinity, Number.isFinite(high) ? high : Infinity];
  };

  const orders = new Map();
  const sorted = (table, sort) => {
    if (!orders.has(sort)) {
      const sign = sort.startsWith("-") ? -1 : 1;
      const name = sort.replace(/^-/, "");
      const values = { id: table.rank, margin: table.margin, score: table.score, entropy: table.entropy, duration: table.duration }[name] ?? table.margin;
      // Rows without the number (quarantined ones) always come last; equal ones are in the order of their ids.
      const compare = (a, b) => {
        const [x, y] = [values[a], values[b]];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || table.rank[a] - table.rank[b];
        return sign * (x - y) || table.rank[a] - table.rank[b];
      };
      orders.set(sort, Int32Array.from({ length: table.size }, (_, row) => row).sort(compare));
    }
    return orders.get(sort);
  };

  // Tests of a row number; a name that is not there matches nothing.
  const tests = (table, query, corrections) => {
    const { site } = table;
    const made = [];
    const named = (field, names, column) => {
      if (query[field] === "") return;
      const place = names.indexOf(query[field]);
      made.push((row) => place >= 0 && column[row] === place);
    };
    if (site.truths && query.label !== "") {
      const place = site.labels.indexOf(query.label);
      made.push((row) => table.top[row].includes(place));
    } else named("label", site.labels, table.label);
    named("true", table.truths, table.truth);
    named("split", site.splits, table.split);
    named("reason", site.reasons, table.reason);
    if (query.status === "abstained") made.push((row) => table.abstained[row] === 1);
    else named("status", table.statuses, table.status);
    for (const field of ["score", "margin"]) {
      if (query[field] === "") continue;
      const [low, high] = kinoray.readRange(query[field]);
      const values = table[field];
      made.push((row) => values[row] >= low && values[row] <= high);
    }
    if (query.duration !== "") {
      const [low, high] = kinoray.readRange(query.duration);
      made.push((row) => table.duration[row] >= low && table.duration[row] < high); // as the bars count: to below the end
    }
    named("codec", table.codecs, table.codec);
    if (query.folder !== "") {
      const inside = `${kinoray.pathOf(query.folder)}/`;
      made.push((row) => kinoray.pathOf(table.id[row]).startsWith(inside));
    }
    if (query.verdict !== "") {
      made.push((row) => table.verdict(row) === query.verdict);
    }
    if (query.corrected !== "") {
      const wanted = query.corrected === "yes";
      made.push((row) => corrections.has(table.key[row]) === wanted);
    }
    if (query.picked !== "") made.push(kinoray.isPicked);
    const text = query.text.trim().toLowerCase();
    if (text !== "") made.push((row) => table.lower[row].includes(text));
    return made;
  };

  // Row numbers that match, in order; with `like` only those of it, and in its order.
  kinoray.select = (table, query, corrections, like = null) => {
    const keep = tests(table, query, corrections);
    const order = like ?? sorted(table, query.sort || "margin");
    return keep.length ? order.filter((row) => keep.every((test) => test(row))) : order;
  };
})();
