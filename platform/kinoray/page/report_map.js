// A map of the videos by what the network sees in them, and the videos that are most like one.
(() => {
  const { make, name, count } = kinoray;
  const get = (id) => document.getElementById(id);
  const NUM_COLOURS = 9; // of the most frequent classes; all others are grey
  const REACH = 14; // pixels from the pointer within which a point is meant
  const MARGIN = 14;
  let points = null; // {row, x, y}: x and y in -1 .. 1
  let from = null; // where a box begins, in pixels of the canvas
  let to = null;

  const colourOf = (table) => {
    const counts = new Map();
    for (const { row } of points) counts.set(table.label[row], (counts.get(table.label[row]) ?? 0) + 1);
    const first = [...counts].filter(([label]) => label >= 0).sort((a, b) => b[1] - a[1]).slice(0, NUM_COLOURS);
    return new Map(first.map(([label], place) => [label, `hsl(${(40 * place) % 360}, 65%, 50%)`]));
  };

  // Where a point is drawn; the same scale along both sides.
  const placeOf = (canvas, point) => {
    const half = Math.min(canvas.width, canvas.height) / 2 - MARGIN;
    return [canvas.width / 2 + half * point.x, canvas.height / 2 - half * point.y];
  };

  const draw = () => {
    const { table } = kinoray.app;
    const canvas = get("map");
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    const pen = canvas.getContext("2d");
    const colours = colourOf(table);
    const style = getComputedStyle(document.body);
    const size = scale * (points.length > 5000 ? 1.5 : 3);
    for (const point of points) {
      const [x, y] = placeOf(canvas, point);
      pen.fillStyle = colours.get(table.label[point.row]) ?? style.getPropertyValue("--unknown");
      pen.globalAlpha = kinoray.isPicked(point.row) ? 1 : 0.65;
      pen.beginPath();
      pen.arc(x, y, kinoray.isPicked(point.row) ? 1.8 * size : size, 0, 7);
      pen.fill();
    }
    if (from && to) {
      pen.globalAlpha = 1;
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
    }
    const named = [...colours].map(([label, colour]) => [colour, name(table.site.labels[label])]);
    if (points.some(({ row }) => !colours.has(table.label[row]))) named.push(["var(--unknown)", "others"]);
    const legend = named.map(([colour, words]) => {
      const key = make("span", { class: "key" });
      key.style.background = colour;
      return make("li", {}, key, words);
    });
    get("map-legend").replaceChildren(...legend);
  };

  // Once more, as the selection is now.
  kinoray.drawMap = () => {
    if (points && get("map").clientWidth) draw();
  };

  const showCard = (row) => {
    const { table, corrections } = kinoray.app;
    const card = kinoray.makeCard(table, row);
    get("map-card").replaceChildren(card);
    kinoray.showChoice(table, card.querySelector("article"), corrections);
    for (const element of card.querySelectorAll("[data-strip]")) kinoray.fillStrip(table.site, element);
    for (const element of card.querySelectorAll("[data-windows]")) kinoray.fillWindows(table, element);
    kinoray.showPicks();
  };

  const pixelOf = (event) => {
    const canvas = get("map");
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  };

  const nearestTo = ([x, y]) => {
    const canvas = get("map");
    let best = null;
    let least = (REACH * (window.devicePixelRatio || 1)) ** 2;
    for (const point of points) {
      const [left, top] = placeOf(canvas, point);
      const distance = (left - x) ** 2 + (top - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  };

  const ended = (event) => {
    if (!from) return;
    const end = pixelOf(event);
    const [low, high] = [0, 1].map((reduce) => [0, 1].map((side) => Math[reduce ? "max" : "min"](from[side], end[side])));
    const isBox = high[0] - low[0] > 5 && high[1] - low[1] > 5;
    from = null;
    to = null;
    if (isBox) {
      const canvas = get("map");
      const inside = points.filter((point) => placeOf(canvas, point).every((at, side) => at >= low[side] && at <= high[side]));
      kinoray.pickRows(inside.map((point) => point.row));
      kinoray.say(`${count(inside.length)} videos selected`);
    } else {
      const point = nearestTo(end);
      if (point) showCard(point.row);
    }
    draw();
  };

  // Show the map; its files are loaded the first time.
  kinoray.showMap = async () => {
    const { site } = kinoray.app;
    if (!points) {
      let chunks;
      try {
        chunks = await Promise.all(Array.from({ length: site.rows }, (_, index) => kinoray.load(`map-${index}`)));
      } catch (error) {
        get("map-said").textContent = error.message;
        return;
      }
      points = chunks.flat().flatMap((place, row) => (place ? [{ row, x: place[0], y: place[1] }] : []));
      const canvas = get("map");
      canvas.addEventListener("pointerdown", (event) => {
        from = pixelOf(event);
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!from) return;
        to = pixelOf(event);
        draw();
      });
      canvas.addEventListener("pointerup", ended);
      window.addEventListener("resize", kinoray.drawMap);
    }
    draw();
  };

  // The row numbers that are most like a row, itself first; null where the site does not know.
  kinoray.like = async (table, key) => {
    const row = table.key.indexOf(key);
    if (row < 0 || !table.site.similar) return null;
    const found = await kinoray.part(table.site, "similar", row);
    return found ? [row, ...found[0]] : null;
  };
})();
