// The page: what logic.js computes, as a document. Foreign text becomes text nodes, never markup.
"use strict";

(() => {
  const MATHML = "http://www.w3.org/1998/Math/MathML";
  const CACHE_CHARS = 2e8;     // of text that stays unpacked
  const SEARCH_AFTER = 200;    // milliseconds without another key
  const byId = (id) => document.getElementById(id);

  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  // ---- where the data comes from: this file, or the server that has sent it

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function typed(values) {
    const array = (name, kind) => new kind(Uint8Array.from(atob(values[name]), (c) => c.charCodeAt(0)).buffer);
    return {right: array("right", Uint16Array), total: array("total", Uint16Array), verdicts: array("verdicts", Uint8Array),
      reasons: array("reasons", Uint32Array), tokens: array("tokens", Uint32Array), steps: array("steps", Uint32Array)};
  }

  const embedded = (meta) => {
    const texts = new Map();
    let held = 0;
    async function chunk(view, number) {
      const id = `chunk-${view}-${number}`;
      let text = texts.get(id);
      if (text === undefined) {
        text = await unpacked(id);
        held += text.length;
        for (const [old, content] of texts) {
          if (held <= CACHE_CHARS) break;
          texts.delete(old);
          held -= content.length;
        }
      } else texts.delete(id);
      texts.set(id, text);
      return text;
    }
    const place = (starts, item) => {
      let low = 0, high = starts.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (starts[middle] <= item) low = middle;
        else high = middle - 1;
      }
      return low;
    };
    return {
      index: async (view) => typed(JSON.parse(await unpacked(`index-${view}`))),
      async items(view, numbers) {
        const starts = meta.views[view].chunks, parsed = new Map(), found = [];
        for (const number of numbers) {
          const own = place(starts, number);
          if (!parsed.has(own)) parsed.set(own, JSON.parse(await chunk(view, own)));
          found.push(parsed.get(own)[number - starts[own]]);
        }
        return found;
      },
      async search(view, text, goesOn, say) {
        const {chunks: starts, items} = meta.views[view], hits = new Uint8Array(items);
        for (let number = 0; number < starts.length; number++) {
          const json = await chunk(view, number);
          if (!goesOn()) return null;
          if (logic.mayHold(json, text))
            JSON.parse(json).forEach((item, place) => { hits[starts[number] + place] = logic.holds(item, text) ? 1 : 0; });
          if (number % 64 === 63) say(`searching, ${Math.round(100 * number / starts.length)} %`);
        }
        return hits;
      },
    };
  };

  const served = (meta) => {
    const ask = async (path) => {
      const answer = await fetch(path);
      if (!answer.ok) throw new Error(`the server says ${answer.status}; is phimr show --serve still running?`);
      return answer.json();
    };
    return {
      index: async (view) => typed(await ask(`index/${view}`)),
      items: (view, numbers) => numbers.length ? ask(`items/${view}?n=${Array.from(numbers).join(",")}`) : [],
      async search(view, text, goesOn, say) {
        say("searching");
        const found = await ask(`search/${view}?q=${encodeURIComponent(text)}`);
        if (!goesOn()) return null;
        const hits = new Uint8Array(meta.views[view].items);
        for (const item of found) hits[item] = 1;
        return hits;
      },
    };
  };

  // ---- the page

  let meta, source, state, generation = 0, found = new Uint32Array(0), shown = [], timer = 0;
  const indexes = new Map(), searches = new Map();
  const raw = {math: false};
  const view = () => meta.views[state.view];
  const count = (number) => number.toLocaleString("en");

  function set(changes) {
    state = {...state, ...changes};
    history.replaceState(null, "", logic.formatState(state));
    return render();
  }

  const fresh = (changes) => set({page: 0, item: -1, sample: 0, diff: "", ...changes});

  async function render() {
    const own = ++generation, goesOn = () => own === generation;
    document.body.dataset.state = "working";
    try {
      tabs();
      if (!indexes.has(state.view)) indexes.set(state.view, await source.index(state.view));
      const index = indexes.get(state.view);
      let hits = null;
      if (state.text) {
        const key = `${state.view} ${state.text}`;
        if (!searches.has(key)) {
          const answer = await source.search(state.view, state.text, goesOn, say);
          if (answer === null) return;
          searches.clear();
          searches.set(key, answer);
        }
        hits = searches.get(key);
      }
      if (!goesOn()) return;
      found = logic.select(view(), index, state, hits);
      const pages = Math.max(1, Math.ceil(found.length / logic.PAGE));
      state.page = Math.min(Math.max(state.page, 0), pages - 1);
      const numbers = Array.from(found.subarray(state.page * logic.PAGE, (state.page + 1) * logic.PAGE));
      const wide = window.matchMedia("(min-width: 821px)").matches;
      if (state.item < 0 && wide && numbers.length) state.item = numbers[0];
      const wanted = state.item >= 0 && state.item < view().items && !numbers.includes(state.item)
        ? [...numbers, state.item] : numbers;
      const items = await source.items(state.view, wanted);
      if (!goesOn()) return;
      shown = numbers;
      filters();
      list(numbers, items, index);
      const place = wanted.indexOf(state.item);
      detail(place < 0 ? null : items[place]);
      const all = found.length === view().items ? "" : ` of ${count(view().items)}`;
      say(`${count(found.length)}${all} ${view().items === 1 ? "item" : "items"}`
        + (pages > 1 ? `, page ${count(state.page + 1)} of ${count(pages)}` : ""));
      byId("before").disabled = state.page === 0;
      byId("after").disabled = state.page === pages - 1;
      document.body.dataset.state = "ready";
    } catch (error) {
      say(`This cannot be shown: ${error.message}`);
      document.body.dataset.state = "failed";
    }
  }

  const say = (text) => { byId("status").textContent = text; };

  function tabs() {
    byId("tabs").replaceChildren(...meta.views.map((one, place) => h("button", {
      role: "tab", "aria-selected": String(place === state.view), title: `key ${place + 1}`,
      onclick: () => fresh({...logic.EMPTY, view: place}),
    }, `${one.name} `, h("span", {class: "soft"}, count(one.items)))));
    byId("note").textContent = view().note;
    byId("note").hidden = !view().note;
  }

  function choice(name, label, options) {
    const select = h("select", {"aria-label": label, id: `choose-${name}`, onchange: (event) => fresh({[name]: event.target.value})},
      ...options.map(([value, text]) => h("option", {value, selected: state[name] === value}, text)));
    return h("label", {}, h("span", {class: "soft"}, label), select);
  }

  function filters() {
    const one = view(), many = one.panes.length > 1;
    const bar = byId("choices"), focused = document.activeElement && document.activeElement.id;
    bar.replaceChildren(...[
      one.graded && choice("verdict", "verdict", [["", "any"], ...meta.verdicts.map((name, place) => [String(place), name])]),
      one.graded && many && choice("pane", one.kind === "pairs" ? "of" : "of stage",
        [["", "any"], ...one.panes.map((name, place) => [String(place), name])]),
      one.reasons.length > 1 && choice("reason", "reason", [["", "any"], ...one.reasons.map((name, place) => [String(place), name])]),
      one.kind === "questions" && many && choice("change", "since the first", [["", "any"], ["gained", "gained"], ["lost", "lost"]]),
      one.steps.length > 1 && choice("step", "step", [["", "any"], ...one.steps.map((step) => [String(step), String(step)])]),
      choice("sort", "order", [["", "as it is"], ["hardest", "hardest first"], ["easiest", "easiest first"],
        ["longest", "longest first"], ["shortest", "shortest first"]]),
      h("button", {onclick: () => fresh({...logic.EMPTY, view: state.view})}, "clear"),
    ].filter(Boolean));
    const search = byId("search");
    if (document.activeElement !== search) search.value = state.text;
    if (focused && focused.startsWith("choose-") && byId(focused)) byId(focused).focus();
  }

  function list(numbers, items, index) {
    const panes = view().panes;
    byId("list").replaceChildren(...numbers.map((number, place) => {
      const marks = panes.map((name, pane) => {
        const at = number * panes.length + pane, total = index.total[at], graded = view().graded && index.verdicts[at] > 0;
        const bar = h("i", {});
        bar.style.width = graded ? `${100 * index.right[at] / total}%` : "0";
        return h("span", {class: `mark${graded ? " graded" : ""}`,
          title: total ? `${name}: ${graded ? `${index.right[at]} of ${total} correct` : view().kind === "drops" ? "shown" : `${total} not graded`}` : `${name}: none`}, bar);
      });
      const item = items[place], step = index.steps[number];
      return h("li", {role: "option", "aria-selected": String(number === state.item), "data-item": number,
        onclick: () => set({item: number, sample: 0, diff: ""})},
        h("div", {class: "asked", dir: "auto"}, item.q),
        h("div", {class: "marks"}, ...marks, h("span", {class: "soft"}, step ? `step ${step}` : "")));
    }));
    const chosen = byId("list").querySelector('[aria-selected="true"]');
    if (chosen) chosen.scrollIntoView({block: "nearest"});
  }

  function rich(text) {
    const element = h("div", {class: "text", dir: "auto"});
    for (const part of raw.math ? [{text}] : logic.segments(text)) {
      const tree = part.tex === undefined ? null : logic.mathml(part.tex);
      if (tree === null) element.append(part.text === undefined ? part.source : part.text);
      else {
        const math = built(["math", part.block ? {display: "block"} : {}, [tree]]);
        math.setAttribute("title", part.source);
        element.append(part.block ? h("span", {class: "block"}, math) : math);
      }
    }
    return element;
  }

  function built(tree) {
    if (typeof tree === "string") return document.createTextNode(tree);
    const [tag, attributes, children] = tree, element = document.createElementNS(MATHML, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.map(built));
    return element;
  }

  const kind = (verdict) => verdict === "" ? "" : verdict === "correct" || verdict === "wrong" ? verdict : "other";
  const chosen = (pane) => pane[Math.min(state.sample, pane.length - 1)];

  // The responses side by side: a pane each, or every sample of the only pane.
  function cards(item) {
    const names = view().panes;
    if (names.length > 1) return item.p.map((pane, place) => ({name: names[place], pane, one: chosen(pane)})).filter((card) => card.one);
    const whose = view().kind === "questions" ? `${names[0]}, ` : "";
    return item.p[0].map((one, place) => ({name: `${whose}sample ${place + 1}`, pane: [one], one}));
  }

  function detail(item) {
    document.body.classList.toggle("has-item", item !== null);
    if (item === null) { byId("detail").replaceChildren(); return; }
    const all = cards(item);
    byId("detail").replaceChildren(
      h("div", {class: "card"},
        h("div", {class: "question"}, rich(item.q)),
        item.a ? h("div", {class: "gold"}, h("span", {class: "soft"}, "gold answer "), h("b", {dir: "auto"}, item.a)) : null,
        h("div", {class: "soft"}, [item.id, ...item.f].join(" · "))),
      difference(all),
      h("div", {class: "panes"}, ...all.map(card)));
  }

  function card({name, pane, one}) {
    const facts = [...(one.w === null ? [] : [`reward ${one.w}`]), ...(one.n === null ? [] : [`${count(one.n)} tokens`]), ...one.s];
    const samples = pane.length < 2 ? null : h("div", {class: "samples"}, ...pane.map((other, place) => h("button", {
      class: kind(other.v), "aria-pressed": String(other === one), title: `sample ${place + 1}: ${other.v || "not graded"}`,
      onclick: () => set({sample: place})}, String(place + 1))));
    const read = one.e && one.v !== "correct" ? `; read: ${one.e}` : "";
    return h("section", {class: `pane ${kind(one.v)}`},
      h("div", {class: "head"}, h("h3", {}, name), h("span", {class: "verdict"}, one.v || (view().kind === "drops" ? "" : "not graded"))),
      samples,
      h("div", {class: "soft"}, facts.join(" · ")),
      one.r ? h("div", {class: "soft"}, one.r + read) : null,
      one.t ? h("details", {open: state.open === 1}, h("summary", {}, `thinking, ${count(one.t.length)} characters`), rich(one.t)) : null,
      rich(one.x.replace(/^\s+/, "")));
  }

  function difference(all) {
    if (all.length < 2) return null;
    const given = state.diff.split("-").map(Number);
    const on = state.diff !== "", [first, second] = on && given.length === 2 && given.every((n) => n >= 0 && n < all.length)
      ? given : view().kind === "questions" ? [Math.max(0, all.length - 2), all.length - 1] : [0, 1];
    const pick = (place, other, turn) => h("select", {"aria-label": turn ? "with" : "compare", onchange: (event) => {
      const value = Number(event.target.value);
      set({diff: turn ? `${other}-${value}` : `${value}-${other}`});
    }}, ...all.map((one, number) => h("option", {value: number, selected: number === place}, one.name)));
    const bar = h("div", {class: "bar"},
      h("button", {id: "differ", "aria-pressed": String(on), title: "key d", onclick: () => set({diff: on ? "" : `${first}-${second}`})},
        "difference of two"), ...(on ? [pick(first, second, false), h("span", {class: "soft"}, "and"), pick(second, first, true)] : []));
    if (!on) return bar;
    const {parts, coarse} = logic.diff(all[first].one.t + all[first].one.x, all[second].one.t + all[second].one.x);
    const text = h("div", {class: "text", dir: "auto"}, ...parts.map(([side, part]) =>
      side === 0 ? document.createTextNode(part) : h(side < 0 ? "del" : "ins", {}, part)));
    const same = parts.every(([side]) => side === 0) ? h("div", {class: "soft"}, "They are the same.") : null;
    return h("div", {}, bar, h("div", {class: "diff", id: "difference"}, same,
      coarse ? h("div", {class: "soft"}, "Too long to compare word by word: line by line.") : null, text));
  }

  // ---- keys

  function move(by) {
    const place = found.indexOf(state.item), next = Math.min(Math.max(place + by, 0), found.length - 1);
    if (found.length) set({item: found[place < 0 ? 0 : next], page: Math.floor(next / logic.PAGE), sample: 0, diff: state.diff && view().kind === "pairs" ? state.diff : ""});
  }

  const KEYS = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    n: () => set({page: state.page + 1, item: -1}), p: () => set({page: state.page - 1, item: -1}),
    "/": () => byId("search").focus(),
    t: () => set({open: 1 - state.open}),
    d: () => { const button = byId("differ"); if (button) button.click(); },
    m: () => { raw.math = !raw.math; render(); },
    "[": () => set({sample: Math.max(0, state.sample - 1)}), "]": () => set({sample: state.sample + 1}),
    ArrowLeft: () => set({sample: Math.max(0, state.sample - 1)}), ArrowRight: () => set({sample: state.sample + 1}),
    "?": () => { byId("keys").open = !byId("keys").open; },
    Escape: () => (state.item >= 0 && !window.matchMedia("(min-width: 821px)").matches ? set({item: -1}) : fresh({text: ""})),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement ? document.activeElement.tagName : "");
    if (typing && event.key === "Escape") { document.activeElement.blur(); return; }
    if (typing) return;
    const number = Number(event.key);
    if (number >= 1 && number <= meta.views.length) fresh({...logic.EMPTY, view: number - 1});
    else if (Object.prototype.hasOwnProperty.call(KEYS, event.key)) KEYS[event.key]();
    else return;
    event.preventDefault();
  });

  async function begin() {
    meta = JSON.parse(await unpacked("meta"));
    source = (meta.served ? served : embedded)(meta);
    state = logic.parseState(location.hash);
    state.view = Math.min(Math.max(state.view, 0), meta.views.length - 1);
    byId("search").addEventListener("input", (event) => {
      clearTimeout(timer);
      const text = event.target.value;
      timer = setTimeout(() => fresh({text}), SEARCH_AFTER);
    });
    byId("before").addEventListener("click", KEYS.p);
    byId("after").addEventListener("click", KEYS.n);
    byId("back").addEventListener("click", () => set({item: -1}));
    window.addEventListener("hashchange", () => { state = logic.parseState(location.hash); state.view = Math.min(state.view, meta.views.length - 1); render(); });
    await render();
  }

  begin();
})();
