// The page's charts under the reader's hands: toggles, smoothing, each seed, tokens or hours, log y, hover and zoom.
// Draws into the SVG that svg.py has drawn; without JavaScript that stays. All text is set as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [W, H, L, R, T, B] = data.frame;
  const tools = document.getElementById("tools"), tip = document.getElementById("tip");
  const NAMES = ["step", "tokens", "hours"];
  const svgs = [...document.querySelectorAll("svg.panel")];
  const zoomed = new Map(); // panel -> [from, to] of its x axis

  const element = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
    if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
    return (+value.toPrecision(size >= 1e4 ? 6 : 4)).toString().replace("-", "−");
  };

  function ticks(low, high, count, log) {
    if (log) {
      const found = [];
      for (let power = Math.floor(low); power <= high; power++)
        for (const times of high - low > 2 ? [1] : [1, 2, 5]) {
          const at = power + Math.log10(times);
          if (at >= low && at <= high) found.push(at);
        }
      if (found.length > 2) return found;
      return ticks(10 ** low, 10 ** high, count, false).filter((value) => value > 0).map(Math.log10);
    }
    let step = 10 ** Math.floor(Math.log10((high - low) / count));
    step *= [1, 2, 2.5, 5].find((times) => (high - low) / (step * times) <= count) || 10;
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index <= Math.floor(high / step + 1e-9); index++) found.push(index * step);
    return found;
  }

  // Mean of each value and those before it that are less than `steps` steps away.
  function trailing(at, values, steps) {
    let sum = 0, start = 0;
    return values.map((value, index) => {
      sum += value;
      while (at[start] <= at[index] - steps) sum -= values[start++];
      return sum / (index - start + 1);
    });
  }

  // One method: at the steps that all its seeds that have not ended have. The x of a mean is the mean of the seeds' x.
  function meanOf(seeds) {
    const steps = [...new Set(seeds.flatMap((seed) => seed.steps))].sort((a, b) => a - b);
    const places = seeds.map((seed) => new Map(seed.steps.map((step, index) => [step, index])));
    const ends = seeds.map((seed) => seed.steps[seed.steps.length - 1]);
    const points = [];
    for (const step of steps) {
      const left = seeds.filter((_, index) => ends[index] >= step);
      const at = left.map((seed) => places[seeds.indexOf(seed)].get(step));
      if (at.includes(undefined)) continue;
      const ys = left.map((seed, index) => seed.y[at[index]]), xs = left.map((seed, index) => seed.x[at[index]]);
      const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
      points.push({ step, x: mean(xs), y: mean(ys), low: Math.min(...ys), high: Math.max(...ys), n: ys.length });
    }
    const whole = points.filter((point) => point.step <= Math.min(...ends)).length;
    return { points: whole ? points : [], whole };
  }

  function state() {
    const form = new FormData(tools);
    return { methods: new Set(form.getAll("method").map(Number)), axis: +form.get("x"), smooth: form.get("smooth"),
      seeds: form.has("seeds"), log: form.has("log") };
  }

  function lines(panel, chosen) {
    const methods = new Map();
    for (const [method, xs, values] of panel.series) {
      const x = data.x[xs][chosen.axis], steps = data.x[xs][0];
      if (!chosen.methods.has(method) || !x) continue;
      // A curve with a target is read point by point.
      const window = chosen.smooth === "" || panel.target !== null ? panel.smooth : +chosen.smooth;
      const y = window > 1 ? trailing(steps, values, window) : values;
      if (!methods.has(method)) methods.set(method, []);
      methods.get(method).push({ steps, x, y });
    }
    return [...methods].map(([method, seeds]) => ({ method, seeds, ...meanOf(seeds) }));
  }

  function draw(svg) {
    const panel = data.panels[svgs.indexOf(svg)], chosen = state(), drawn = lines(panel, chosen);
    const every = drawn.flatMap((line) => line.seeds);
    let [from, to] = zoomed.get(svg) || [0, Math.max(...every.map((seed) => seed.x[seed.x.length - 1]))];
    if (!(to > from)) to = from + 1;
    const inside = (x) => x >= from && x <= to;
    const between = (kept) => drawn.flatMap((line) => chosen.seeds || !line.points.length
      ? line.seeds.flatMap((seed) => seed.y.filter((_, index) => kept(seed.x[index])))
      : line.points.filter((point) => kept(point.x)).flatMap((point) => [point.low, point.high]));
    let shown = between(inside);
    if (!shown.length) shown = between(() => true);
    if (panel.target !== null) shown.push(panel.target);
    const positive = shown.filter((value) => value > 0), log = chosen.log && positive.length > 0;
    const scale = log ? Math.log10 : (value) => value;
    const target = log && panel.target <= 0 ? null : panel.target;
    const sorted = (log ? positive : shown).map(scale).sort((a, b) => a - b);
    const cut = sorted.length > 50 ? Math.floor(sorted.length / 100) : 0;
    let low = sorted[cut] ?? 0, high = sorted[sorted.length - 1 - cut] ?? 1;
    if (target !== null) { low = Math.min(low, scale(target)); high = Math.max(high, scale(target)); }
    const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    low = log || low < 0 || low - margin > 0 ? low - margin : 0;
    high += margin;
    const X = (x) => L + (W - L - R) * (x - from) / (to - from);
    const Y = (y) => T + (H - T - B) * (high - scale(y)) / (high - low);
    const grid = svg.querySelector(".grid"), inner = svg.querySelector(".data");
    grid.replaceChildren();
    inner.replaceChildren();
    for (const tick of ticks(low, high, 5, log)) {
      const y = T + (H - T - B) * (high - tick) / (high - low);
      grid.append(element("path", { d: `M${L},${y}H${W - R}` }));
      grid.append(element("text", { class: "y", x: L - 6, y: y + 4 }, short(log ? 10 ** tick : tick)));
    }
    for (const tick of ticks(from, to, 5, false)) {
      grid.append(element("path", { d: `M${X(tick)},${T}V${H - B}` }));
      grid.append(element("text", { class: "x", x: X(tick), y: H - B + 15 }, short(tick)));
    }
    const wanted = panel.series.filter(([method]) => chosen.methods.has(method)).length, lacking = wanted - every.length;
    const window = panel.target === null && +chosen.smooth > 1 ? `mean of ${chosen.smooth} steps` : "";
    const unlogged = lacking && (every.length ? `${lacking} of ${wanted} seeds not logged` : "not logged here");
    grid.append(element("text", { class: "axis", x: (L + W - R) / 2, y: H - 4 },
      [NAMES[chosen.axis], window, log && "log y", unlogged].filter(Boolean).join("; ")));
    // What a logarithm does not have: a gap in a line, the lower edge for a band.
    const path = (points) => {
      let next = "M";
      return points.map(([x, y]) => {
        const drop = log && y <= 0, piece = drop ? "" : `${next}${X(x).toFixed(1)},${Y(y).toFixed(1)}`;
        next = drop ? "M" : "L";
        return piece;
      }).join("");
    };
    const bottom = (y) => log ? Math.max(y, 10 ** low) : y;
    if (target !== null) inner.append(element("path", { class: "target", d: `M${L},${Y(target)}H${W - R}` }));
    for (const { method, seeds, points, whole } of drawn.reverse()) {
      const group = element("g", { class: "m" + method });
      const add = (list, kind, dash) => {
        const d = path(list);
        if (d) group.append(element("path", { class: kind, d, ...(dash && { "stroke-dasharray": dash }) }));
      };
      const dash = data.methods[method].dash;
      if (chosen.seeds || !points.length) for (const seed of seeds) add(seed.x.map((x, index) => [x, seed.y[index]]), "thin", dash);
      else if (points.some((point) => point.high > point.low))
        add([...points.map((point) => [point.x, bottom(point.high)]), ...points.map((point) => [point.x, bottom(point.low)]).reverse()], "band");
      const mean = points.map((point) => [point.x, point.y]);
      if (whole < mean.length) add(mean.slice(whole - 1), "thin", dash);
      if (whole === 1 && (!log || mean[0][1] > 0)) group.append(element("circle", { cx: X(mean[0][0]), cy: Y(mean[0][1]), r: 3.5 }));
      add(mean.slice(0, whole), "line", dash);
      inner.append(group);
    }
    for (const [method, step, label, filled] of chosen.axis === 0 && target !== null ? panel.marks : []) {
      if (!chosen.methods.has(method) || !inside(step)) continue;
      const group = element("g", { class: `m${method} mark${filled ? " filled" : ""}` });
      group.append(element("circle", { cx: X(step), cy: Y(target), r: filled ? 5 : 7 }));
      group.append(element("text", { x: X(step), y: Math.min(Y(target) + (filled ? -9 : 20), H - B - 3),
        "text-anchor": X(step) > 0.8 * W ? "end" : "start" }, label));
      inner.append(group);
    }
    svg.drawn = { X, from, to, drawn };
    tools.elements.reset.hidden = !zoomed.size;
  }

  // Only what is on the screen is drawn again at once, the rest when it is scrolled to.
  const stale = new Set(), visible = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      visible[isIntersecting ? "add" : "delete"](target);
      if (isIntersecting && stale.delete(target)) draw(target);
    }
  }, { rootMargin: "200px" });
  const redraw = () => {
    tip.hidden = true;
    for (const svg of svgs) if (visible.has(svg)) draw(svg); else stale.add(svg);
  };

  const position = (svg, event) => {
    const box = svg.getBoundingClientRect();
    return (event.clientX - box.left) * W / box.width;
  };
  function hover(svg, event) {
    if (!svg.drawn) draw(svg);
    const { X, from, to, drawn } = svg.drawn, at = position(svg, event);
    const found = drawn.flatMap(({ method, points }) => {
      const near = points.filter((point) => point.x >= from && point.x <= to);
      if (!near.length) return [];
      return [{ method, point: near.reduce((a, b) => Math.abs(X(b.x) - at) < Math.abs(X(a.x) - at) ? b : a) }];
    });
    svg.querySelector(".cursor")?.remove();
    tip.hidden = !found.length || at < L;
    if (tip.hidden) return;
    const nearest = found.reduce((a, b) => Math.abs(X(b.point.x) - at) < Math.abs(X(a.point.x) - at) ? b : a).point;
    svg.append(element("path", { class: "cursor", d: `M${X(nearest.x)},${T}V${H - B}` }));
    tip.replaceChildren(Object.assign(document.createElement("strong"), { textContent: `step ${short(nearest.step)}` }));
    for (const { method, point } of found.sort((a, b) => b.point.y - a.point.y)) {
      const row = document.createElement("div"), swatch = element("svg", { class: `swatch m${method}`, viewBox: "0 0 28 10" });
      swatch.append(element("path", { class: "line", d: "M0,5H28", "stroke-dasharray": data.methods[method].dash }));
      const range = point.n > 1 ? ` (${short(point.low)} to ${short(point.high)}, ${point.n} seeds)` : " (1 seed)";
      const where = point.step === nearest.step ? "" : ` at step ${short(point.step)}`;
      row.append(swatch, `${data.methods[method].label} ${short(point.y)}${range}${where}`);
      tip.append(row);
    }
    const right = event.clientX > innerWidth / 2;
    tip.style.left = right ? "" : `${event.clientX + 14}px`;
    tip.style.right = right ? `${innerWidth - event.clientX + 14}px` : "";
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4))}px`;
  }

  for (const svg of svgs) {
    watch.observe(svg);
    let begun = null;
    const leave = () => { tip.hidden = true; svg.querySelector(".cursor")?.remove(); svg.querySelector(".chosen")?.remove(); };
    svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && !event.button) begun = position(svg, event); hover(svg, event); });
    svg.addEventListener("pointermove", (event) => {
      hover(svg, event);
      svg.querySelector(".chosen")?.remove();
      if (begun === null) return;
      const ends = [begun, position(svg, event)].sort((a, b) => a - b);
      svg.append(element("rect", { class: "chosen", x: ends[0], y: T, width: ends[1] - ends[0], height: H - T - B }));
    });
    addEventListener("pointerup", (event) => {
      if (begun === null) return;
      const { from, to } = svg.drawn, back = (at) => from + (to - from) * Math.min(1, Math.max(0, (at - L) / (W - L - R)));
      const ends = [begun, position(svg, event)].sort((a, b) => a - b);
      begun = null;
      leave();
      const range = ends.map(back);
      if (ends[1] - ends[0] < 8 || range[0] === range[1]) return;
      zoomed.set(svg, range);
      draw(svg);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("dblclick", () => { zoomed.delete(svg); draw(svg); });
  }
  tools.addEventListener("input", (event) => { if (event.target.name === "x") zoomed.clear(); redraw(); });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.elements.reset.addEventListener("click", () => { zoomed.clear(); redraw(); });
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not(.example)")) fold.open = true;
    stale.forEach(draw);
    stale.clear();
  });
  tools.hidden = false;
  document.getElementById("legend").hidden = true; // the tools have one
})();
