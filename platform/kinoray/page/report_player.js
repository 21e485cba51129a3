// A video on its card: where this page can play it from, the player, and the windows that were labelled.
(() => {
  const { make, name, percent } = kinoray;

  // `kinoray report --serve` gives the site such an address, and has the videos below it.
  const isServed = window.location.protocol === "http:" && /^\/kinoray-[\w-]{22}\//.test(window.location.pathname);
  const isOnDisk = window.location.protocol === "file:";

  const fileAddress = (uri) => {
    if (uri.startsWith("/")) return `file://${uri.split("/").map(encodeURIComponent).join("/")}`;
    return /^file:\/\/(localhost)?\//.test(uri) ? uri : "";
  };

  // The address of a video that is a file of its own, where the page is one, too; "" of others.
  kinoray.fileOf = (table, row) => (isOnDisk && table.offset[row] === null ? fileAddress(table.uri[row]) : "");

  const hasLink = (table, row) => table.site.linksUntil && table.offset[row] === null && table.uri[row].startsWith("s3://");

  kinoray.canPlay = (table, row) => isServed || hasLink(table, row) || kinoray.fileOf(table, row) !== "";

  const addressOf = async (table, row) => {
    if (isServed) return `media/${table.key[row]}`;
    if (hasLink(table, row)) return (await kinoray.part(table.site, "links", row)) ?? "";
    return kinoray.fileOf(table, row);
  };

  // "0:07.5", "1:02:00".
  const clock = (seconds) => {
    const tenths = Math.round(10 * seconds);
    const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
    const rest = String((tenths % 600) / 10).padStart(tenths % 10 ? 4 : 2, "0");
    return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
  };

  // Only one player is open at a time: each may hold one of the few connections that a browser makes to a server.
  let player = null;

  kinoray.stop = () => {
    if (!player) return;
    const { article, box, video } = player;
    player = null;
    video.removeAttribute("src");
    video.load(); // lets go of the connection
    box.remove();
    article.classList.remove("playing");
    article.querySelector("[data-play]").textContent = "Play";
  };

  const failed = (table, row, box, video) => {
    const why = video.error?.message ? ` (${video.error.message})` : "";
    const until = hasLink(table, row) && !isServed ? ` Its address is good until ${table.site.linksUntil}.` : "";
    box.replaceChildren(make("p", { class: "strip empty" }, `This browser cannot play it${kinoray.visible(why)}.${until}`));
  };

  // Back to the begin of the window when its end is reached.
  const loop = () => {
    const { video, span } = player;
    if (!span || (video.currentTime < span[1] && !video.ended)) return;
    video.currentTime = span[0];
    if (video.ended) video.play().catch(() => {}); // as below
  };

  const open = (table, article) => {
    const row = Number(article.dataset.row);
    const video = make("video", { controls: true, playsinline: true, preload: "auto", "aria-label": "Video" });
    const box = make("div", { class: "player" }, video);
    const mine = { article, box, video, span: null, ready: null };
    player = mine;
    article.prepend(box);
    article.classList.add("playing");
    article.querySelector("[data-play]").textContent = "Close";
    video.addEventListener("error", () => mine === player && failed(table, row, box, video));
    video.addEventListener("ended", () => mine === player && loop());
    const follow = () => {
      if (mine !== player) return;
      loop();
      window.requestAnimationFrame(follow);
    };
    const start = async () => {
      try {
        const address = await addressOf(table, row);
        if (address === "") throw new Error("There is no address for it");
        if (mine === player) video.src = address;
      } catch (error) {
        box.replaceChildren(make("p", { class: "strip empty" }, name(error.message)));
      }
      follow();
    };
    mine.ready = start();
  };

  // Play the video of a card, from `span` = [begin, end] on in a loop, or all of it.
  kinoray.play = async (table, article, span = null) => {
    if (player?.article !== article) {
      kinoray.stop();
      open(table, article);
    }
    const mine = player;
    mine.span = span;
    await mine.ready;
    if (mine !== player || mine.span !== span || !mine.video.isConnected) return; // closed, or another one was chosen
    if (span) mine.video.currentTime = span[0];
    mine.video.play().catch(() => {}); // the error event says what is wrong
  };

  kinoray.togglePlay = (table, article) => {
    if (player?.article === article) kinoray.stop();
    else if (article.querySelector("[data-play]")) kinoray.play(table, article);
  };

  // Where the bytes of a video are, as text.
  kinoray.whereIs = (table, row) => {
    const [offset, length] = [table.offset[row], table.length[row]];
    if (offset === null || length === null) return table.uri[row];
    return `${table.uri[row]} bytes ${offset} to ${offset + length - 1}`;
  };

  // The text that only shows, so that nothing hides in what is pasted.
  kinoray.copy = async (table, article, button) => {
    const text = kinoray.visible(kinoray.whereIs(table, Number(article.dataset.row)));
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch (error) {
      const place = article.querySelector("details");
      place.open = true;
      window.getSelection().selectAllChildren(place.querySelector("code"));
      button.textContent = "Selected";
      button.title = `The browser does not copy by itself here (${error.name}): press Ctrl+C`;
    }
  };

  // Windows

  // Fill the place of a card's windows: a line of time with a mark for each, and a list to choose from.
  kinoray.fillWindows = async (table, element) => {
    const row = Number(element.dataset.windows);
    let found;
    try {
      found = await kinoray.part(table.site, "windows", row);
    } catch (error) {
      element.replaceChildren(make("p", { class: "note" }, "No windows: ", name(error.message)));
      return;
    }
    if (!found) return;
    const [begins, ends, labels, scores] = found;
    const last = ends.reduce((most, end) => Math.max(most, end), 0.001);
    const said = (place) => {
      const answer = labels[place] < 0 ? "no class" : kinoray.visible(table.site.labels[labels[place]]);
      const score = scores[place] === null ? "" : ` ${percent(scores[place])}`;
      return `${clock(begins[place])} to ${clock(ends[place])}: ${answer}${score}`;
    };
    const marks = begins.map((begin, place) => {
      const kind = labels[place] === table.label[row] ? "mark same" : "mark";
      const mark = make("span", { class: kind, "data-window": String(place), title: said(place) });
      mark.style.left = `${(100 * begin) / last}%`;
      mark.style.width = `${(100 * (ends[place] - begin)) / last}%`;
      return mark;
    });
    const options = begins.map((_, place) => make("option", { value: String(place) }, said(place)));
    const all = make("option", { value: "" }, `All ${begins.length} windows`);
    element.spans = begins.map((begin, place) => [begin, ends[place]]);
    element.replaceChildren(
      make("div", { class: "timeline", "aria-hidden": "true" }, ...marks),
      make("select", { "aria-label": "Window" }, all, ...options),
    );
  };

  // Mark one window of a card, "" for none, and play it in a loop where the page can.
  kinoray.showWindow = (table, article, place) => {
    const element = article.querySelector("[data-windows]");
    element.querySelector("select").value = place;
    for (const mark of element.querySelectorAll(".mark")) mark.classList.toggle("chosen", mark.dataset.window === place);
    if (article.querySelector("[data-play]")) kinoray.play(table, article, place === "" ? null : element.spans[Number(place)]);
  };
})();
