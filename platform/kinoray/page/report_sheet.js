// What is known of one class: counts, mean score, precision and recall, and what it is taken for.
(() => {
  const { make, name, percent, count } = kinoray;

  const share = (right, total) => (total ? `${percent(right / total)}` : "none");

  const classTiles = (table, record, label) => {
    const listed = table.site.truths
      ? table.top.filter((top) => top.includes(label)).length
      : table.label.reduce((sum, place) => sum + (place === label), 0);
    const tiles = [
      ["Videos called so", count(record.predicted), listed < record.predicted ? `${count(listed)} of them listed` : "all of them listed"],
      ["Mean score", record.meanScore === null ? "none" : percent(record.meanScore), table.site.truths ? "of this class" : "of the first answer"],
    ];
    if (table.site.truth) {
      tiles.push(["Precision", share(record.right, record.called), `${count(record.right)} right of ${count(record.called)} called so`]);
      tiles.push(["Recall", share(record.right, record.true), `${count(record.right)} right of ${count(record.true)} that are so`]);
    }
    const made = tiles.map(([title, value, note]) =>
      make("div", {}, make("dt", {}, title), make("dd", {}, value), make("dd", { class: "note" }, note)),
    );
    return make("dl", { class: "tiles" }, ...made);
  };

  const classLink = (query, ...text) => make("a", { href: kinoray.writeQuery({ view: "videos", page: 1, ...query }) }, ...text);

  // Fill the element with the sheet of the class that the query names, or hide it.
  kinoray.showSheet = (table, query, sheet) => {
    const { site } = table;
    const label = site.labels.indexOf(query.label);
    sheet.hidden = query.label === "";
    if (sheet.hidden) return;
    if (label < 0) {
      sheet.replaceChildren(make("p", { class: "warning" }, "There is no class ", name(query.label), " in this report."));
      return;
    }
    const record = site.classes[label] ?? { predicted: 0, meanScore: null, called: 0, true: 0, right: 0 };
    const near = [label - 1, label + 1].filter((place) => place >= 0 && place < site.labels.length);
    const links = near.map((place) => classLink({ label: site.labels[place] }, place < label ? "\u2190 " : "", name(site.labels[place]), place > label ? " \u2192" : ""));
    const parts = [make("p", { class: "near" }, ...links), make("h2", {}, "Class ", name(query.label)), classTiles(table, record, label)];
    if (record.takenFor?.length) {
      const items = record.takenFor.flatMap(([other, number]) => [
        classLink({ label: site.labels[other], true: query.label }, name(site.labels[other])),
        ` ${count(number)}  `,
      ]);
      parts.push(make("p", { class: "note" }, "True ones were most often taken for: ", ...items));
    }
    sheet.replaceChildren(...parts);
  };
})();
