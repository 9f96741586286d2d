// What the page can do beyond being read: hide methods, show what is under the pointer, follow a run from figure to figure, sort tables.
(() => {
  const root = document.documentElement, all = (what, from = document) => [...from.querySelectorAll(what)];
  root.classList.add("script");

  for (const box of all("#tools input")) box.addEventListener("change", () => {
    for (const one of all("[data-method]"))
      if (one.dataset.method === box.value) one.classList.toggle("off", !box.checked);
  });

  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  const show = (text, event) => {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const right = event.clientX > window.innerWidth * 0.65;
    tip.style.left = right ? "" : `${event.pageX + 14}px`;
    tip.style.right = right ? `${document.documentElement.clientWidth - event.pageX + 14}px` : "";
    tip.style.top = `${event.pageY + 14}px`;
  };

  // A point's <title> is its tip for readers without this script; with it, the larger tip takes over.
  for (const point of all(".p")) {
    const title = point.querySelector("title");
    if (!title) continue;
    const text = title.textContent;
    title.remove();
    point.addEventListener("mousemove", (event) => { event.stopPropagation(); show(text, event); });
    point.addEventListener("mouseleave", () => show(""));
  }
  const follow = (name, on) => {
    for (const one of all("[data-run]")) if (one.dataset.run === name) one.classList.toggle("on", on);
  };
  for (const one of all("[data-run]")) {
    one.addEventListener("mouseenter", () => follow(one.dataset.run, true));
    one.addEventListener("mouseleave", () => follow(one.dataset.run, false));
  }

  // Laws under the pointer: each line's height at the pointer's place, turned back into a value.
  const value = (at, numbers, log) => {
    const [low, high, start, stop] = numbers.split(" ").map(Number);
    const found = low + (high - low) * (at - start) / (stop - start);
    return log === "1" ? 10 ** found : found;
  };
  const height = (line, x) => {
    const points = line.getAttribute("d").slice(1).replace("Z", "").split("L").map((p) => p.split(" ").map(Number));
    for (let i = 1; i < points.length; i++) {
      const [[a, b], [c, d]] = [points[i - 1], points[i]];
      if (Math.min(a, c) <= x && x <= Math.max(a, c) && a !== c) return b + (d - b) * (x - a) / (c - a);
    }
    return NaN;
  };
  for (const panel of all("svg[data-x]")) {
    panel.addEventListener("mousemove", (event) => {
      const at = panel.createSVGPoint();
      [at.x, at.y] = [event.clientX, event.clientY];
      const x = at.matrixTransform(panel.getScreenCTM().inverse()).x;
      const [xname, yname] = panel.dataset.names.split("|");
      const said = all("[data-law]:not(.off)", panel).map((line) => [line.dataset.law, height(line, x)])
        .filter(([, y]) => Number.isFinite(y))
        .map(([law, y]) => `${law}: ${value(y, panel.dataset.y, panel.dataset.ylog).toPrecision(4)}`);
      show(said.length ? `${xname} ${value(x, panel.dataset.x, panel.dataset.xlog).toPrecision(3)}\n${yname}\n${said.join("\n")}` : "", event);
    });
    panel.addEventListener("mouseleave", () => show(""));
  }

  const number = (cell) => parseFloat(cell.textContent.replaceAll(",", ""));
  for (const head of all("th")) head.addEventListener("click", () => {
    const rows = all("tr", head.closest("table")).slice(1), column = [...head.parentNode.children].indexOf(head);
    const up = head.dataset.up !== "1";
    head.dataset.up = up ? "1" : "";
    rows.sort((one, two) => {
      const [a, b] = [one.children[column], two.children[column]], [x, y] = [number(a), number(b)];
      const order = Number.isNaN(x) || Number.isNaN(y) ? a.textContent.localeCompare(b.textContent) : x - y;
      return up ? order : -order;
    });
    rows[0].parentNode.append(...rows);
  });
})();
