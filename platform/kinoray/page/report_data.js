"use strict";
// The data files and what they hold. Each calls kinoray.deliver(name, build, value); they are loaded as scripts, since a
// page that was opened from a disk may not fetch. Names in them are data: they become text, never markup or code.
const kinoray = {};
(() => {
  const nonce = document.currentScript.nonce;
  const delivered = new Map();
  const isDataFile = /^data\/[a-z]+(-\d+)?\.js\?v=[0-9a-f]+$/;
  const createScriptURL = (url) => {
    if (!isDataFile.test(url)) throw new TypeError(`${url} is no data file of this site`);
    return url;
  };
  const policy = window.trustedTypes
    ? window.trustedTypes.createPolicy("kinoray", { createScriptURL })
    : { createScriptURL };

  kinoray.deliver = (name, build, value) => delivered.set(name, { build, value });

  // The value of data/NAME.js; rejects with a sentence for the reader.
  kinoray.load = (name) =>
    new Promise((resolve, reject) => {
      const build = document.body.dataset.build;
      const script = document.createElement("script");
      script.nonce = nonce;
      script.src = policy.createScriptURL(`data/${name}.js?v=${build}`);
      const refuse = (why) =>
        reject(new Error(`data/${name}.js ${why}. Copy the whole folder of the report, or make it again.`));
      script.onerror = () => refuse("could not be read");
      script.onload = () => {
        script.remove();
        const found = delivered.get(name);
        delivered.delete(name);
        if (!found) return refuse("is damaged");
        if (found.build !== build) return refuse("belongs to another report; reload the page");
        return resolve(found.value);
      };
      document.head.append(script);
    });

  const numbers = (chunks, name, Kind) => Kind.from(chunks.flatMap((chunk) => chunk[name]), (x) => (x === null ? NaN : x));

  // All rows as columns; NaN or -1 where there is no value. `media`: lengths and codecs, where the site has them.
  kinoray.makeTable = (site, chunks, media) => {
    const table = { site, size: 0 };
    for (const name of ["id", "key", "offset", "length", "text", "top", "scores"]) {
      table[name] = chunks.flatMap((chunk) => chunk[name]);
    }
    table.uri = chunks.flatMap((chunk) => chunk.uri.map((place) => chunk.uris[place]));
    for (const name of ["rank", "reason", "truth", "split", "strip", "windows"]) table[name] = numbers(chunks, name, Int32Array);
    for (const name of ["status", "abstained"]) table[name] = numbers(chunks, name, Uint8Array);
    // Where a video may have several classes (site.truths): whether they are the true ones, 1, 0 or -1 for not known.
    if (site.truths) table.right = numbers(chunks, "right", Int8Array);
    for (const name of ["margin", "entropy"]) table[name] = numbers(chunks, name, Float64Array);
    table.size = table.id.length;
    table.label = Int32Array.from(table.top, (top) => (top.length ? top[0] : -1));
    table.score = Float64Array.from(table.scores, (scores) => (scores.length ? scores[0] : NaN));
    table.lower = table.id.map((id) => id.toLowerCase());
    table.duration = media.length ? numbers(media, "duration", Float64Array) : new Float64Array(table.size).fill(NaN);
    table.codecs = [...new Set(media.flatMap((chunk) => chunk.codecs))].sort();
    const codecOf = (chunk) => chunk.codec.map((place) => (place < 0 ? -1 : table.codecs.indexOf(chunk.codecs[place])));
    table.codec = media.length ? Int32Array.from(media.flatMap(codecOf)) : new Int32Array(table.size).fill(-1);
    table.statuses = ["labelled", "quarantined", "skipped"];
    table.truths = site.truths ?? site.labels;
    table.verdict = (row) => {
      if (table.right) return ["wrong", "right"][table.right[row]] ?? null;
      if (table.truth[row] < 0 || table.label[row] < 0) return null;
      return table.truth[row] === table.label[row] ? "right" : "wrong";
    };
    // What the model said, as a correction says it; null where it said nothing.
    table.said = (row) => {
      if (!site.truths) return table.label[row] < 0 ? null : site.labels[table.label[row]];
      if (table.statuses[table.status[row]] !== "labelled") return null;
      return kinoray.asList(table.top[row].map((label) => site.labels[label]));
    };
    return table;
  };

  // Classes of a video in one text, and back: "red|round", "|" for none.
  kinoray.asList = (names) => [...new Set(names)].sort().join("|") || "|";
  kinoray.inList = (text) => text.split("|").filter((name) => name !== "");

  // What a file has of a few rows each (strips, windows, links); the last files stay in memory.
  const MOST_FILES = 80;
  const files = new Map();
  kinoray.part = async (site, kind, number) => {
    const file = `${kind}-${Math.floor(number / site.perStripFile)}`;
    const promise = files.get(file) ?? kinoray.load(file);
    files.delete(file);
    files.set(file, promise);
    if (files.size > MOST_FILES) files.delete(files.keys().next().value);
    return (await promise)[number % site.perStripFile];
  };

  // Text with characters that hide or reorder it spelled out; the same as kinoray.console.visible.
  const hidden = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
  kinoray.visible = (text) =>
    String(text).replace(hidden, (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);

  // An id as a path: video_ids have __ where the names of files have a slash.
  kinoray.pathOf = (id) => id.replaceAll("__", "/");

  // The folder of an id, and those around it: "a__b__c" -> "a/b", "a".
  kinoray.foldersOf = (id) => {
    const parts = kinoray.pathOf(id).split("/").slice(0, -1);
    return parts.map((_, index) => parts.slice(0, parts.length - index).join("/")).filter((folder) => folder !== "");
  };

  kinoray.percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
  kinoray.count = (number) => number.toLocaleString("en-US");

  // An element. Attribute names are ours; values and children (text or elements) may be anybody's.
  kinoray.make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  };
  kinoray.name = (text) => kinoray.make("bdi", {}, kinoray.visible(text));
})();
