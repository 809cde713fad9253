// What the page computes, without a document: filters, search, differences, mathematics. Tested in Node alone.
"use strict";

const logic = (() => {
  const CORRECT = 0;
  const MOST_CELLS = 4e6;      // of the table that a difference is computed in
  const PAGE = 40;             // items in the list at once

  const own = (table, name) => Object.prototype.hasOwnProperty.call(table, name);

  // ---- state: everything that is chosen, as it stands behind the # of the address

  const EMPTY = {view: 0, text: "", verdict: "", pane: "", reason: "", change: "", step: "", sort: "", page: 0, item: -1,
    sample: 0, open: 0, diff: ""};

  function parseState(hash) {
    const state = {...EMPTY};
    for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
      if (!own(EMPTY, name)) continue;
      const number = typeof EMPTY[name] === "number";
      if (!number) state[name] = value;
      else if (/^-?\d{1,9}$/.test(value)) state[name] = Number(value);
    }
    return state;
  }

  function formatState(state) {
    const given = Object.keys(EMPTY).filter((name) => state[name] !== EMPTY[name]);
    return "#" + new URLSearchParams(given.map((name) => [name, String(state[name])]));
  }

  // ---- filters: the same as select() of items.py

  // view: {panes, names, verdicts: [...]}; index: {right, total, verdicts, reasons, tokens, steps} as typed arrays;
  // hits: null or one byte an item.
  function select(view, index, state, hits) {
    const count = index.tokens.length, panes = view.panes.length;
    const pane = state.pane === "" ? -1 : Number(state.pane);
    const last = pane < 0 ? panes - 1 : pane;
    const bit = state.verdict === "" ? 0 : 1 << Number(state.verdict);
    const reason = state.reason === "" ? 0 : 1 << Number(state.reason);
    const step = state.step === "" ? -1 : Number(state.step);
    const found = new Uint32Array(count);
    let size = 0;
    for (let item = 0; item < count; item++) {
      if (hits && !hits[item]) continue;
      const start = item * panes;
      if (reason && !(index.reasons[item] & reason)) continue;
      if (step >= 0 && index.steps[item] !== step) continue;
      if (bit) {
        let held = 0;
        if (pane >= 0) held = index.verdicts[start + pane];
        else for (let place = 0; place < panes; place++) held |= index.verdicts[start + place];
        if (!(held & bit)) continue;
      }
      if (state.change) {
        if (!index.total[start] || !index.total[start + last]) continue;
        const change = index.right[start + last] / index.total[start + last] - index.right[start] / index.total[start];
        if (state.change === "gained" ? !(change > 0) : !(change < 0)) continue;
      }
      found[size++] = item;
    }
    return sorted(found.subarray(0, size), index, panes, state.sort);
  }

  function sorted(items, index, panes, how) {
    if (!how) return items;
    const share = (item) => {
      let right = 0, total = 0;
      for (let place = item * panes; place < (item + 1) * panes; place++) {
        right += index.right[place];
        total += index.total[place];
      }
      return total ? right / total : 0;
    };
    const key = how === "longest" ? (item) => -index.tokens[item] : how === "shortest" ? (item) => index.tokens[item]
      : how === "hardest" ? share : (item) => -share(item);
    const keys = new Float64Array(index.tokens.length);
    for (const item of items) keys[item] = key(item);
    return items.slice().sort((a, b) => keys[a] - keys[b] || a - b);
  }

  function holds(item, text) {
    const wanted = text.toLowerCase();
    const has = (value) => value !== undefined && value !== null && String(value).toLowerCase().includes(wanted);
    if (has(item.id) || has(item.q) || has(item.a)) return true;
    return item.p.some((pane) => pane.some((one) => has(one.t + one.x) || has(one.e) || has(one.r)));
  }

  // Whether the text of a chunk can hold what is searched, before it is parsed: a text in it is written as JSON.
  function mayHold(json, text) {
    return json.toLowerCase().includes(JSON.stringify(text).slice(1, -1).toLowerCase());
  }

  // ---- the difference of two texts, word by word

  // [kind, text] with kind 0 for both, -1 for the first alone, 1 for the second alone.
  function diff(first, second) {
    const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
    let a = words(first), b = words(second), coarse = false;
    let begin = 0, end = 0;
    const trim = () => {
      begin = 0;
      end = 0;
      while (begin < a.length && begin < b.length && a[begin] === b[begin]) begin++;
      while (end < a.length - begin && end < b.length - begin && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
    };
    trim();
    if ((a.length - begin - end) * (b.length - begin - end) > MOST_CELLS) {
      const lines = (text) => text.match(/[^\n]*\n|[^\n]+$/g) || [];
      [a, b, coarse] = [lines(first), lines(second), true];
      trim();
    }
    const left = a.slice(begin, a.length - end), right = b.slice(begin, b.length - end);
    const middle = left.length * right.length > MOST_CELLS ? [[-1, left.join("")], [1, right.join("")]]
      : longest(left, right);
    const parts = [[0, a.slice(0, begin).join("")], ...middle, [0, a.slice(a.length - end).join("")]];
    return {parts: joined(parts.filter(([, text]) => text)), coarse};
  }

  function longest(a, b) {
    const width = b.length + 1, table = new Uint32Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        table[i * width + j] = a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    const parts = [];
    let i = 0, j = 0;
    while (i < a.length && j < b.length) {
      if (a[i] === b[j]) { parts.push([0, a[i]]); i++; j++; }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) parts.push([-1, a[i++]]);
      else parts.push([1, b[j++]]);
    }
    while (i < a.length) parts.push([-1, a[i++]]);
    while (j < b.length) parts.push([1, b[j++]]);
    return parts;
  }

  function joined(parts) {
    const found = [];
    for (const [kind, text] of parts) {
      const last = found[found.length - 1];
      if (last && last[0] === kind) last[1] += text;
      else found.push([kind, text]);
    }
    return found;
  }

  // ---- mathematics: TeX as trees of MathML, [name, attributes, children], children being trees or texts

  const DELIMITED = /\$\$([\s\S]{1,4000}?)\$\$|\\\[([\s\S]{1,4000}?)\\\]|\\\(([\s\S]{1,4000}?)\\\)|\$(?![\s\d,.]*\$)(?!\s)((?:\\.|[^$\\\n]){1,1000}?)(?<!\s)\$(?!\d)|(\\boxed)(?=\s*\{)/g;

  // A text in parts: {text}, or {tex, block} for mathematics.
  function segments(text) {
    const parts = [];
    let place = 0, match;
    DELIMITED.lastIndex = 0;
    while ((match = DELIMITED.exec(text)) !== null) {
      let tex = match[1] ?? match[2] ?? match[3] ?? match[4], end = DELIMITED.lastIndex;
      if (match[5]) {
        end = closing(text, text.indexOf("{", match.index));
        if (end < 0) continue;
        tex = text.slice(match.index, end);
      }
      if (match.index > place) parts.push({text: text.slice(place, match.index)});
      parts.push({tex, block: match[1] !== undefined || match[2] !== undefined, source: text.slice(match.index, end)});
      place = DELIMITED.lastIndex = end;
    }
    if (place < text.length) parts.push({text: text.slice(place)});
    return parts;
  }

  function closing(text, start) {
    let depth = 0;
    for (let place = start; place < text.length && place < start + 2000; place++) {
      if (text[place] === "\\") place++;
      else if (text[place] === "{") depth++;
      else if (text[place] === "}" && --depth === 0) return place + 1;
    }
    return -1;
  }

  const GREEK = Object.fromEntries(("alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ "
    + "iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ "
    + "chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω ell ℓ hbar ℏ "
    + "infty ∞ partial ∂ nabla ∇ emptyset ∅ varnothing ∅ Re ℜ Im ℑ aleph ℵ angle ∠ triangle △ circ ∘ degree ° prime ′ "
    + "ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱ dotsc … dotsb ⋯ top ⊤ bot ⊥").split(" ")
    .map((word, place, all) => [word, all[place + 1]]).filter((_, place) => place % 2 === 0));
  const SIGNS = Object.fromEntries(("cdot ⋅ times × div ÷ pm ± mp ∓ ast ∗ star ⋆ bullet ∙ oplus ⊕ otimes ⊗ le ≤ leq ≤ leqslant ≤ "
    + "ge ≥ geq ≥ geqslant ≥ ne ≠ neq ≠ equiv ≡ approx ≈ sim ∼ simeq ≃ cong ≅ propto ∝ ll ≪ gg ≫ to → rightarrow → leftarrow ← "
    + "Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ leftrightarrow ↔ implies ⟹ iff ⟺ mapsto ↦ longrightarrow ⟶ in ∈ notin ∉ ni ∋ "
    + "subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ cup ∪ cap ∩ setminus ∖ wedge ∧ land ∧ vee ∨ lor ∨ neg ¬ lnot ¬ forall ∀ "
    + "exists ∃ mid ∣ nmid ∤ parallel ∥ perp ⟂ therefore ∴ because ∵ colon : lvert | rvert | vert | Vert ‖ lfloor ⌊ rfloor ⌋ "
    + "lceil ⌈ rceil ⌉ langle ⟨ rangle ⟩ backslash \\ sum ∑ prod ∏ coprod ∐ int ∫ iint ∬ oint ∮ bigcup ⋃ bigcap ⋂ "
    + "checkmark ✓ uparrow ↑ downarrow ↓").split(" ")
    .map((word, place, all) => [word, all[place + 1]]).filter((_, place) => place % 2 === 0));
  const LARGE = new Set(["sum", "prod", "coprod", "bigcup", "bigcap", "lim", "max", "min", "sup", "inf", "gcd"]);
  const NAMES = new Set(("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp lim max min sup inf gcd "
    + "lcm det dim ker deg arg mod Pr hom").split(" "));
  const FONTS = {mathbb: "double-struck", mathbf: "bold", boldsymbol: "bold", bm: "bold", mathcal: "script", mathscr: "script",
    mathfrak: "fraktur", mathsf: "sans-serif"};
  const DOUBLE = {N: "ℕ", Z: "ℤ", Q: "ℚ", R: "ℝ", C: "ℂ", P: "ℙ", F: "𝔽", E: "𝔼"};
  const TEXTS = new Set(["text", "textbf", "textit", "textrm", "mathrm", "operatorname", "mbox", "mathit", "texttt"]);
  const SPACES = {",": "0.17em", ":": "0.22em", ";": "0.28em", " ": "0.33em", "!": "0", quad: "1em", qquad: "2em", "\n": "0.33em"};
  const ACCENTS = {overline: "¯", bar: "¯", hat: "^", widehat: "^", vec: "→", overrightarrow: "→", tilde: "~", widetilde: "~",
    dot: "˙", ddot: "¨"};
  const IGNORED = new Set(["displaystyle", "textstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl",
    "Bigr", "biggl", "biggr", "Biggl", "Biggr", "nonumber", "hline"]);
  const TABLES = {matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], vmatrix: ["|", "|"], Bmatrix: ["{", "}"],
    cases: ["{", ""], aligned: ["", ""], align: ["", ""], "align*": ["", ""], array: ["", ""], gathered: ["", ""], smallmatrix: ["", ""]};
  const DEEPEST = 40;

  // The tree of a formula; null for one that holds what is not known, which is shown as it is written.
  function mathml(tex) {
    const tokens = tex.match(/\\[A-Za-z]+\*?|\\[\s\S]|\d+(?:[.,]\d+)*|[\s\S]/gu) || [];
    let place = 0, depth = 0;
    class Unknown extends Error {}
    const fail = () => { throw new Unknown(); };
    const peek = () => { while (/^\s$/.test(tokens[place] ?? "")) place++; return tokens[place]; };
    const row = (children) => children.length === 1 ? children[0] : ["mrow", {}, children];
    const sign = (text, attributes = {}) => ["mo", attributes, [text]];

    function group() {
      if (++depth > DEEPEST) fail();
      const token = peek();
      let tree;
      if (token === undefined || token === "}" || token === "&") fail();
      if (token === "{") {
        place++;
        tree = row(sequence(["}"]));
        place++;
      } else if (/^\d\d/.test(token)) {
        // \frac12 is a half.
        tokens.splice(place, 1, ...token);
        tree = atom();
      } else tree = atom();
      depth--;
      return tree;
    }

    function raw() {
      if (peek() !== "{") fail();
      let level = 0, text = "";
      do {
        const token = tokens[place++];
        if (token === undefined) fail();
        if (token === "{" && level++ === 0) continue;
        if (token === "}" && --level === 0) break;
        text += token.replace(/^\\([{}$%&#_ ])$/, "$1");
      } while (level > 0);
      return text;
    }

    function sequence(ends) {
      const children = [];
      for (;;) {
        const token = peek();
        if (token === undefined) { if (ends.length) fail(); return children; }
        if (ends.includes(token)) return children;
        if (token === "}" || token === "&" || token === "\\\\") fail();
        const tree = scripted();
        if (tree) children.push(tree);
      }
    }

    function scripted() {
      const name = peek();
      let base = name === "_" || name === "^" ? ["mrow", {}, []] : name === "{" ? group() : atom(), under = null, over = null;
      if (base === null) return null;
      for (let token = peek(); token === "_" || token === "^" || token === "'"; token = peek()) {
        place++;
        if (token === "'") over = over ? row([over, sign("′")]) : sign("′");
        else if (token === "_") { if (under) fail(); under = group(); }
        else over = over ? row([over, group()]) : group();
      }
      if (!under && !over) return base;
      const large = LARGE.has(name.slice(1));
      const tag = under && over ? (large ? "munderover" : "msubsup") : under ? (large ? "munder" : "msub") : large ? "mover" : "msup";
      return [tag, {}, [base, ...(under ? [under] : []), ...(over ? [over] : [])]];
    }

    function fence(token) {
      if (token === undefined) fail();
      if (token === ".") return "";
      if (token.startsWith("\\")) {
        const known = {"\\{": "{", "\\}": "}", "\\|": "‖"};
        return own(known, token) ? known[token] : own(SIGNS, token.slice(1)) ? SIGNS[token.slice(1)] : fail();
      }
      return /^[()[\]|/<>]$/.test(token) ? token : fail();
    }

    function atom() {
      const token = peek();
      place++;
      if (/^\d/.test(token)) return ["mn", {}, [token]];
      if (!token.startsWith("\\")) {
        if (/^\p{L}$/u.test(token)) return ["mi", {}, [token]];
        if (token === "~") return ["mspace", {width: "0.33em"}, []];
        if (token === "#" || token === "$" || token === "%") fail();
        return sign(token === "-" ? "−" : token === "*" ? "∗" : token, "()[]|".includes(token) ? {stretchy: "false"} : {});
      }
      const name = token.slice(1);
      if (own(GREEK, name)) return ["mi", {}, [GREEK[name]]];
      if (own(SIGNS, name)) return sign(SIGNS[name], "|⌊⌋⌈⌉⟨⟩".includes(SIGNS[name]) ? {stretchy: "false"} : {});
      if (own(SPACES, name)) return ["mspace", {width: SPACES[name]}, []];
      if (NAMES.has(name)) return ["mi", {mathvariant: "normal"}, [name]];
      if (IGNORED.has(name)) return null;
      if (TEXTS.has(name)) return ["mtext", {}, [raw()]];
      if (own(ACCENTS, name)) return ["mover", {accent: "true"}, [group(), sign(ACCENTS[name])]];
      if (own(FONTS, name)) {
        const tree = group();
        if (name === "mathbb" && tree[0] === "mi" && own(DOUBLE, tree[2][0])) return ["mi", {}, [DOUBLE[tree[2][0]]]];
        return ["mstyle", {class: FONTS[name]}, [tree]];
      }
      switch (name) {
        case "frac": case "dfrac": case "tfrac": case "cfrac": return ["mfrac", {}, [group(), group()]];
        case "binom": case "dbinom": case "tbinom":
          return row([sign("("), ["mfrac", {linethickness: "0"}, [group(), group()]], sign(")")]);
        case "sqrt": {
          if (peek() !== "[") return ["msqrt", {}, [group()]];
          place++;
          const degree = row(sequence(["]"]));
          place++;
          return ["mroot", {}, [group(), degree]];
        }
        case "boxed": case "fbox": return ["mrow", {class: "boxed"}, [group()]];
        case "underline": return ["munder", {}, [group(), sign("_")]];
        case "pmod": return row([sign("("), ["mi", {mathvariant: "normal"}, ["mod"]], ["mspace", {width: "0.33em"}, []], group(), sign(")")]);
        case "bmod": return sign("mod");
        case "not": { const tree = group(); return ["mo", {}, [text(tree) + "\u0338"]]; }
        case "left": {
          const opening = fence(peek());
          place++;
          const inner = [];
          for (;;) {
            inner.push(...sequence(["\\right", "\\middle"]));
            if (tokens[place++] === "\\right") break;
            inner.push(sign(fence(peek()), {fence: "true"}));
            place++;
          }
          const close = fence(peek());
          place++;
          return row([...(opening ? [sign(opening, {fence: "true", stretchy: "true"})] : []), ...inner,
            ...(close ? [sign(close, {fence: "true", stretchy: "true"})] : [])]);
        }
        case "begin": return table(raw());
        case "{": case "}": return sign(name, {stretchy: "false"});
        case "|": return sign("‖", {stretchy: "false"});
        case "%": case "$": case "&": case "#": case "_": return ["mtext", {}, [name]];
        default: return fail();
      }
    }

    function text(tree) {
      return typeof tree === "string" ? tree : tree[2].map(text).join("");
    }

    function table(name) {
      if (!own(TABLES, name)) fail();
      if (name === "array" && peek() === "{") raw();
      const rows = [];
      let cells = [];
      for (;;) {
        cells.push(["mtd", {}, sequence(["&", "\\\\", "\\end"])]);
        const token = tokens[place++];
        if (token === "&") continue;
        rows.push(["mtr", {}, cells]);
        cells = [];
        if (token === "\\end") break;
        if (peek() === "\\end") { place++; break; }
      }
      if (raw() !== name) fail();
      const [opening, close] = TABLES[name];
      const grid = ["mtable", name === "cases" || name.startsWith("align") ? {class: "left"} : {}, rows];
      return row([...(opening ? [sign(opening, {fence: "true", stretchy: "true"})] : []), grid,
        ...(close ? [sign(close, {fence: "true", stretchy: "true"})] : [])]);
    }

    try {
      return row(sequence([]));
    } catch (error) {
      if (error instanceof Unknown || error instanceof TypeError) return null;
      throw error;
    }
  }

  return {CORRECT, EMPTY, PAGE, parseState, formatState, select, holds, mayHold, diff, segments, mathml};
})();

if (typeof module !== "undefined") module.exports = logic;
