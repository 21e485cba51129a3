"use strict";
(() => {
  const list = document.getElementById("videos");
  const form = document.getElementById("controls");
  if (!list || !form) return;
  const cards = Array.from(list.children);
  const output = document.getElementById("matching");
  const nothing = document.getElementById("nothing");
  const order = new Map(cards.map((card, index) => [card, index]));
  const names = ["status", "verdict", "label", "true", "split"];

  const number = (card, key) => (card.dataset[key] === "" ? null : Number(card.dataset[key]));
  // Cards without the number (quarantined ones) always come last; equal ones keep their order.
  const compare = (key, sign) => (a, b) => {
    const [x, y] = [number(a, key), number(b, key)];
    if (x === null || y === null) return (x === null) - (y === null) || order.get(a) - order.get(b);
    return sign * (x - y) || order.get(a) - order.get(b);
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const orders = {
    "margin": compare("margin", 1),
    "-margin": compare("margin", -1),
    "score": compare("score", 1),
    "-score": compare("score", -1),
    "-entropy": compare("entropy", -1),
    "entropy": compare("entropy", 1),
    "id": (a, b) => collator.compare(a.dataset.id, b.dataset.id),
  };

  const filter = () => {
    const text = form.elements.text.value.trim().toLowerCase();
    const wanted = names.filter((name) => form.elements[name] && form.elements[name].value !== "");
    let count = 0;
    for (const card of cards) {
      const keep =
        wanted.every((name) => card.dataset[name] === form.elements[name].value.slice(1)) &&
        (text === "" || card.dataset.id.toLowerCase().includes(text));
      card.hidden = !keep;
      count += keep;
    }
    output.textContent = `${count} of ${cards.length} match`;
    nothing.hidden = count > 0;
  };
  const sort = () => list.append(...[...cards].sort(orders[form.elements.sort.value]));

  form.addEventListener("input", (event) => (event.target.name === "sort" ? sort() : filter()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { sort(); filter(); }));

  // A cell of the confusion table shows its videos.
  document.addEventListener("click", (event) => {
    const cell = event.target.closest("button[data-predicted]");
    if (!cell) return;
    form.reset();
    setTimeout(() => {
      form.elements.true.value = "=" + cell.dataset.true;
      form.elements.label.value = "=" + cell.dataset.predicted;
      if (cell.dataset.split !== "" && form.elements.split) form.elements.split.value = "=" + cell.dataset.split;
      filter();
      document.getElementById("videos-heading").scrollIntoView();
    });
  });

  form.hidden = false;
  sort();
  filter();
})();
