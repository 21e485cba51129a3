// The keyboard: j k and arrows move between cards, digits choose an answer. Then everything starts.
(() => {
  const get = (id) => document.getElementById(id);
  const list = get("videos");
  const PLACE = "kinoray-keys";
  const articles = () => [...list.querySelectorAll("article")];
  const current = () => document.activeElement?.closest("#videos article") ?? null;

  const focus = (article) => {
    if (!article) return;
    article.focus({ preventScroll: true });
    article.scrollIntoView({ block: "nearest" });
  };

  // The card that many places on; past an end of the page comes the next page.
  const move = (steps) => {
    const all = articles();
    const here = all.indexOf(current());
    if (here < 0) return focus(all[0]);
    const there = here + steps;
    if (there >= 0 && there < all.length) return focus(all[there]);
    if (kinoray.turnTo(kinoray.app.query.page + Math.sign(steps))) focus(articles().at(steps > 0 ? 0 : -1));
    return undefined;
  };

  const perRow = () => {
    const tops = articles().map((article) => article.getBoundingClientRect().top);
    return Math.max(1, tops.filter((top) => Math.abs(top - tops[0]) < 2).length);
  };

  // What a key does to the card that has the focus; whether it is one of those keys.
  const edit = (key, article) => {
    if (/^[1-9]$/.test(key)) {
      const button = article.querySelector(`[data-answer="${Number(key) - 1}"]`);
      if (!button) return true;
      if (kinoray.app.site.truths) {
        button.click();
        return true; // others of the video may be wrong, too
      }
      if (button.getAttribute("aria-pressed") !== "true") button.click();
      move(1);
    } else if (key === "b") {
      kinoray.choose(article, kinoray.BAD);
      move(1);
    } else if (key === "u") kinoray.undo(article);
    else if (key === "y" && kinoray.app.site.truths) {
      article.querySelector("[data-confirm]").click();
      move(1);
    }
    else if (key === "v") kinoray.togglePlay(kinoray.app.table, article);
    else if (key === "x") article.querySelector("[data-pick]").click();
    else if (key === "c") article.querySelector(".correction input").focus();
    else return false;
    return true;
  };

  const moves = {
    j: () => move(1),
    k: () => move(-1),
    ArrowRight: () => move(1),
    ArrowLeft: () => move(-1),
    ArrowDown: () => move(perRow()),
    ArrowUp: () => move(-perRow()),
    n: () => kinoray.turnTo(kinoray.app.query.page + 1),
    p: () => kinoray.turnTo(kinoray.app.query.page - 1),
  };

  const pressed = (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !kinoray.app.table) return;
    const target = event.target;
    if (target.matches?.("video")) return; // it has keys of its own
    if (target.matches?.("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") (target.closest("article") ?? target).focus();
      return;
    }
    if (!get("use-keys").checked) return;
    const article = current();
    let done = true;
    if (event.key === "/") {
      if (kinoray.app.query.view !== "videos") kinoray.go({ view: "videos" });
      get("controls").elements.text.focus();
    } else if (kinoray.app.query.view !== "videos") done = false;
    else if (article && edit(event.key, article)) done = true;
    else if (event.key.startsWith("Arrow") && !article) done = false; // the page scrolls as ever
    else if (moves[event.key]) moves[event.key]();
    else done = false;
    if (done) event.preventDefault();
  };

  document.addEventListener("keydown", pressed);
  get("keys-button").addEventListener("click", (event) => {
    get("keys").hidden = !get("keys").hidden;
    event.target.setAttribute("aria-expanded", String(!get("keys").hidden));
  });
  try {
    get("use-keys").checked = window.localStorage.getItem(PLACE) !== "off";
    get("use-keys").addEventListener("change", (event) => {
      window.localStorage.setItem(PLACE, event.target.checked ? "on" : "off");
    });
  } catch (error) {
    get("use-keys").title = `This browser does not keep the choice (${error.name})`;
  }
  // A click on a card makes it the one that keys act on.
  list.addEventListener("click", (event) => {
    if (!event.target.closest("button, input, select, summary, a, video, .mark")) event.target.closest("article")?.focus({ preventScroll: true });
  });
  kinoray.start();
})();
