"use strict";
(() => {
  const tip = document.getElementById("tip");
  const hidden = new Set();

  // The point of a line nearest to x: its x values only grow.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  const human = (value) => {
    for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= scale) return (value / scale).toPrecision(4) + suffix;
    }
    return String(Math.round(value));
  };

  const row = (left, right, color) => {
    const line = document.createElement("div");
    const name = document.createElement("span");
    const value = document.createElement("b");
    name.textContent = left;
    name.className = color;
    value.textContent = right;
    line.append(name, value);
    return line;
  };

  const follow = (figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg[role=img]");
    const cross = svg.querySelector(".cross");
    const [low, high, start, end] = data.x;
    const leave = () => { tip.hidden = true; cross.style.visibility = "hidden"; };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const unit = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const x = low + (unit - start) / (end - start) * (high - low);
      const lines = data.lines.filter((line) => !hidden.has(line.group));
      if (!lines.length || x < low || x > high) { leave(); return; }
      const found = lines.map((line) => [line, nearest(line.x, x)]);
      const distance = ([line, i]) => Math.abs(line.x[i] - x);
      const first = found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      const at = first[0].x[first[1]];
      const place = start + (at - low) / (high - low) * (end - start);
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      cross.style.visibility = "visible";
      tip.replaceChildren(row("tokens", human(at), "by"));
      for (const [line] of found.slice(0, 24)) {
        tip.append(row(line.key, line.y[nearest(line.x, at)], line.color));
      }
      tip.hidden = false;
      const right = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
      tip.style.left = (right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16) + "px";
      tip.style.top = Math.min(event.clientY + 12, window.innerHeight - tip.offsetHeight) + "px";
    });
  };

  for (const figure of document.querySelectorAll("figure.chart")) follow(figure);

  // A name in a legend hides that source or run in every chart.
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.key");
    if (!button) return;
    const key = button.dataset.key;
    if (!hidden.delete(key)) hidden.add(key);
    for (const element of document.querySelectorAll("[data-key]")) {
      if (element.dataset.key !== key) continue;
      if (element === button || element.matches("button")) {
        element.setAttribute("aria-pressed", String(!hidden.has(key)));
      } else {
        element.classList.toggle("off", hidden.has(key));
      }
    }
  });
})();
