// What the reader says of videos: kept in the browser under the table's digest, and written as CSV.
(() => {
  const BAD = "__bad__";
  const COLUMNS = ["video_id", "row_key", "uri", "offset", "length", "predicted", "label"];

  // A cell that no spreadsheet takes for a formula: a quote sign goes in front where one might.
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    const harmless = /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(harmless) || harmless !== text ? `"${harmless.replaceAll('"', '""')}"` : harmless;
  };

  // A browser keeps some 5 million characters of a site: values alone. Older sites kept them with their names.
  const toStored = (record) => COLUMNS.map((name) => record[name]);
  const fromStored = (stored) =>
    Array.isArray(stored) ? Object.fromEntries(COLUMNS.map((name, place) => [name, stored[place]])) : stored;

  const recordOf = (table, row, label) => ({
    video_id: table.id[row],
    row_key: table.key[row],
    uri: table.uri[row],
    offset: table.offset[row],
    length: table.length[row],
    predicted: table.said(row) ?? "",
    label,
  });

  // Lines of a CSV as lists of cells, each with the number of its line; cells may be quoted and hold what divides them.
  const readCells = (text, divider) => {
    const lines = [];
    let cells = [];
    let value = "";
    let quoted = false;
    let number = 1;
    let begun = 1;
    const end = () => {
      cells.push(value);
      if (cells.some((item) => item.trim() !== "")) lines.push({ number: begun, cells });
      cells = [];
      value = "";
    };
    for (let place = 0; place < text.length; place += 1) {
      const char = text[place];
      if (char === "\n") number += 1;
      if (quoted && char === '"' && text[place + 1] === '"') {
        value += char;
        place += 1;
      } else if (char === '"' && (quoted || value === "")) quoted = !quoted;
      else if (!quoted && char === divider) {
        cells.push(value);
        value = "";
      } else if (!quoted && char === "\n") {
        end();
        begun = number;
      } else if (quoted || char !== "\r" || text[place + 1] !== "\n") value += char;
    }
    if (quoted) throw new Error(`line ${begun}: a quote is not closed`);
    end();
    return lines;
  };

  // A cell without the quote sign that `cell` puts in front.
  const plain = (text) => (/^'[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(text) ? text.slice(1) : text);

  // The corrections in a CSV as `kinoray correct` takes it; an Error says the line of what is wrong.
  const readCsv = (text, table) => {
    const rows = new Map(Array.from(table.key, (key, row) => [key, row]));
    for (const divider of [",", ";", "\t"]) {
      const [head, ...lines] = readCells(text.replace(/^\ufeff?("?sep=[^\n]*\n)?/i, ""), divider);
      const names = head?.cells.map((name) => name.trim()) ?? [];
      if (!names.includes("row_key") || !names.includes("label")) continue;
      return lines.map(({ number, cells }) => {
        const found = Object.fromEntries(names.map((name, place) => [name, plain(cells[place] ?? "")]));
        const key = found.row_key.trim().replace(/^(?=[0-9a-f]{16}$)/, "k");
        if (key === "" || found.label === "") throw new Error(`line ${number}: row_key or label is empty`);
        const row = rows.get(key);
        if (row !== undefined) return recordOf(table, row, found.label);
        return { ...Object.fromEntries(COLUMNS.map((name) => [name, found[name] ?? ""])), row_key: key };
      });
    }
    throw new Error("there are no columns row_key and label; expected the CSV that a report lets you download");
  };

  class Corrections {
    constructor(digest) {
      this.digest = digest;
      this.place = `kinoray-corrections-${digest}`;
      this.records = new Map();
      this.listeners = [];
      this.trouble = "";
      this.read();
      // Another window with the same table has changed them.
      window.addEventListener("storage", (event) => {
        if (event.key !== this.place && event.key !== null) return;
        this.read();
        this.tell();
      });
    }

    read() {
      try {
        const found = JSON.parse(window.localStorage.getItem(this.place) ?? "[]").map(fromStored);
        this.records = new Map(found.map((record) => [record.row_key, record]));
      } catch (error) {
        this.trouble = `This browser keeps no corrections here (${error.name}): download them before you leave.`;
      }
    }

    change(edit) {
      if (!this.trouble) this.read();
      edit(this.records);
      try {
        window.localStorage.setItem(this.place, JSON.stringify([...this.records.values()].map(toStored)));
        this.trouble = "";
      } catch (error) {
        this.trouble = `This browser could not keep the correction (${error.name}): download them before you leave.`;
      }
      this.tell();
    }

    tell() {
      for (const listener of this.listeners) listener();
    }

    get size() {
      return this.records.size;
    }

    has(key) {
      return this.records.has(key);
    }

    // The label that was chosen for a row, BAD, or null.
    chosen(key) {
      return this.records.get(key)?.label ?? null;
    }

    choose(table, row, label) {
      this.change((records) => records.set(table.key[row], recordOf(table, row, label)));
    }

    // Put many records in place of those of the same rows; returns what `restore` takes to undo it.
    put(found) {
      if (!this.trouble) this.read();
      const before = new Map(found.map((record) => [record.row_key, this.records.get(record.row_key)]));
      this.change((records) => {
        for (const record of found) records.set(record.row_key, record);
      });
      return before;
    }

    // Say a label of each of these rows: `labelOf(row)`.
    chooseAll(table, rows, labelOf) {
      return this.put(rows.map((row) => recordOf(table, row, labelOf(row))));
    }

    restore(before) {
      this.change((records) => {
        for (const [key, record] of before) {
          if (record) records.set(key, record);
          else records.delete(key);
        }
      });
    }

    // Take what a file says; returns how many there were, and what `restore` takes.
    load(text, table) {
      const found = readCsv(text, table);
      const listed = new Set(table.key);
      const changed = found.filter((record) => this.has(record.row_key) && this.chosen(record.row_key) !== record.label);
      const strange = found.filter((record) => !listed.has(record.row_key));
      return { size: found.length, changed: changed.length, strange: strange.length, before: this.put(found) };
    }

    undo(key) {
      this.change((records) => records.delete(key));
    }

    clear() {
      this.change((records) => records.clear());
    }

    csv() {
      const lines = [...this.records.values()].map((record) => COLUMNS.map((name) => cell(record[name])).join(","));
      return `${[COLUMNS.join(","), ...lines].join("\r\n")}\r\n`;
    }

    download() {
      const url = URL.createObjectURL(new Blob([this.csv()], { type: "text/csv;charset=utf-8" }));
      const link = kinoray.make("a", { href: url, download: `corrections-${this.digest}.csv` });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    }
  }

  kinoray.BAD = BAD;
  kinoray.Corrections = Corrections;
  // What a chosen label is called on the page.
  kinoray.spoken = (label) => (label === BAD ? "bad video" : label === "|" ? "none of the classes" : kinoray.visible(label));
})();
