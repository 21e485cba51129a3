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
        const found = JSON.parse(window.localStorage.getItem(this.place) ?? "[]");
        this.records = new Map(found.map((record) => [record.row_key, record]));
      } catch (error) {
        this.trouble = `This browser keeps no corrections here (${error.name}): download them before you leave.`;
      }
    }

    change(edit) {
      if (!this.trouble) this.read();
      edit(this.records);
      try {
        window.localStorage.setItem(this.place, JSON.stringify([...this.records.values()]));
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
      const predicted = table.said(row) ?? "";
      const record = { video_id: table.id[row], row_key: table.key[row], uri: table.uri[row], predicted, label };
      record.offset = table.offset[row];
      record.length = table.length[row];
      this.change((records) => records.set(record.row_key, record));
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
