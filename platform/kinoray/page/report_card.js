// One video as a card.
(() => {
  const { make, name, percent } = kinoray;

  const bar = (share) => {
    const inner = make("span");
    inner.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    return make("span", { class: "meter", "aria-hidden": "true" }, inner);
  };

  const badges = (table, row) => {
    const status = table.statuses[table.status[row]];
    const made = [make("span", { class: `badge ${status === "labelled" ? "plain" : "bad"}` }, status)];
    const verdict = table.verdict(row);
    if (verdict) made.push(make("span", { class: `badge ${verdict}` }, verdict));
    if (table.abstained[row]) made.push(make("span", { class: "badge bad" }, "abstained"));
    if (table.split[row] >= 0) made.push(make("span", { class: "badge plain" }, "split ", name(table.site.splits[table.split[row]])));
    const seconds = table.duration[row];
    if (!Number.isNaN(seconds)) made.push(make("span", { class: "badge plain" }, `${Number(seconds.toFixed(seconds < 10 ? 1 : 0))} s`));
    if (table.codec[row] >= 0) made.push(make("span", { class: "badge plain" }, name(table.codecs[table.codec[row]])));
    const what = kinoray.canPlay(table, row) ? ["data-play", "Play"] : ["data-copy", "Copy address"];
    made.push(make("button", { type: "button", [what[0]]: true, class: "play" }, what[1]));
    if (table.site.similar && status === "labelled") {
      const address = kinoray.writeQuery({ view: "videos", page: 1, like: table.key[row] });
      made.push(make("a", { href: address, title: "Videos that the network sees most like it" }, "Similar"));
    }
    return make("p", { class: "badges" }, ...made);
  };

  const facts = (table, row) => {
    const made = [];
    const add = (title, ...value) => made.push(make("div", {}, make("dt", {}, title), make("dd", {}, ...value)));
    if (table.truth[row] >= 0) add("True label", name(kinoray.spoken(table.truths[table.truth[row]])));
    if (!Number.isNaN(table.margin[row])) add("Margin", table.margin[row].toFixed(2));
    if (!Number.isNaN(table.entropy[row])) add("Entropy", table.entropy[row].toFixed(2));
    return make("dl", { class: "facts" }, ...made);
  };

  const answers = (table, row) => {
    const items = table.top[row].map((label, index) => {
      const button = make("button", { type: "button", class: "answer", "data-answer": String(index), "aria-pressed": "false" });
      button.append(
        make("kbd", { "aria-hidden": "true" }, index < 9 ? String(index + 1) : ""),
        make("span", { class: "label" }, name(table.site.labels[label])),
        bar(table.scores[row][index]),
        make("span", { class: "number" }, percent(table.scores[row][index])),
      );
      return make("li", {}, button);
    });
    const what = table.site.truths ? "Classes; take away what is wrong" : "Answers; choose the right one";
    return make("ol", { class: "answers", "aria-label": what }, ...items);
  };

  const correction = (several) =>
    make(
      "div",
      { class: "correction" },
      ...(several ? [make("button", { type: "button", "data-confirm": true, title: "These classes and no other (key: y)" }, "Right as it is")] : []),
      make("input", { type: "text", list: "all-labels", placeholder: "another class", "aria-label": "Another class", autocomplete: "off", spellcheck: "false" }),
      make("button", { type: "button", "data-bad": true, "aria-pressed": "false", title: "Leave it out of training (key: b)" }, "Bad video"),
      make("p", { class: "said", hidden: true }, make("span"), " ", make("button", { type: "button", "data-undo": true, class: "plain" }, "Undo")),
    );

  const empty = (...text) => make("p", { class: "strip empty" }, ...text);

  const strip = (table, row) => {
    if (table.statuses[table.status[row]] !== "labelled") {
      const reason = table.reason[row] < 0 ? "" : `${table.site.reasons[table.reason[row]]}: `;
      return empty(name(reason + (table.text[row] ?? "no reason was recorded")));
    }
    if (table.strip[row] < 0) return null;
    return make("div", { class: "strip waiting", "data-strip": String(table.strip[row]) });
  };

  // Fill a strip that waits: frames, or why there are none.
  kinoray.fillStrip = async (site, element) => {
    let frames;
    try {
      frames = await kinoray.part(site, "strips", Number(element.dataset.strip));
    } catch (error) {
      frames = error.message;
    }
    element.classList.remove("waiting");
    if (typeof frames === "string") {
      element.classList.add("empty");
      element.replaceChildren("No frames: ", name(frames));
      return;
    }
    element.classList.toggle("landscape", frames[0][0] > 1.2 * frames[0][1]);
    element.replaceChildren(
      ...frames.map(([width, height, data], index) =>
        make("img", { src: `data:image/jpeg;base64,${data}`, width, height, decoding: "async", alt: `frame ${index + 1} of ${frames.length}` }),
      ),
    );
    // Those that still wait take as much place, so that nothing moves under the pointer.
    document.body.style.setProperty("--strip-height", `${element.offsetHeight}px`);
  };

  const where = (table, row) => {
    const made = [make("summary", {}, "Where"), make("code", {}, name(kinoray.whereIs(table, row)))];
    const file = kinoray.fileOf(table, row);
    const link = file ? make("a", { href: file, target: "_blank", rel: "noopener noreferrer" }, "Open the file") : "";
    made.push(make("p", { class: "buttons" }, make("button", { type: "button", "data-copy": true }, "Copy address"), link));
    return make("details", {}, ...made);
  };

  kinoray.makeCard = (table, row) => {
    const title = make("h3", { id: `video-${row}` }, name(table.id[row]));
    const pick = make("input", { type: "checkbox", "data-pick": true, "aria-labelledby": title.id, title: "Select (key: x)" });
    const article = make("article", { tabindex: "-1", "aria-labelledby": title.id, "data-row": String(row) });
    const parts = [strip(table, row), make("div", { class: "title" }, title, pick), badges(table, row)];
    if (table.windows[row] > 1) parts.push(make("div", { class: "windows", "data-windows": String(row) }));
    if (table.top[row].length) parts.push(answers(table, row));
    parts.push(facts(table, row), correction(Boolean(table.site.truths)), where(table, row));
    article.append(...parts.filter((part) => part !== null));
    return make("li", {}, article);
  };

  // Show on a card what was chosen for its video.
  kinoray.showChoice = (table, article, corrections) => {
    const row = Number(article.dataset.row);
    const chosen = corrections.chosen(table.key[row]);
    const several = Boolean(table.site.truths);
    const now = several && chosen !== kinoray.BAD ? kinoray.inList(chosen ?? table.said(row) ?? "|") : [chosen];
    for (const button of article.querySelectorAll("[data-answer]")) {
      const label = table.site.labels[table.top[row][Number(button.dataset.answer)]];
      button.setAttribute("aria-pressed", String(now.includes(label)));
    }
    article.querySelector("[data-bad]").setAttribute("aria-pressed", String(chosen === kinoray.BAD));
    article.classList.toggle("corrected", chosen !== null);
    const said = article.querySelector(".said");
    said.hidden = chosen === null;
    if (chosen === null) return;
    const confirms = chosen === table.said(row);
    said.firstChild.replaceChildren(confirms ? "Confirmed: " : "You say: ", make("bdi", {}, kinoray.spoken(chosen)));
  };
})();
