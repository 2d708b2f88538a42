"use strict";
// Values under the pointer or the arrow keys, and buttons that show and hide. The page can be read without it.

const hidden = new Set();

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const plot = figure.querySelector(".plot");
  const [cursor, tip] = [plot.querySelector(".cursor"), plot.querySelector(".tip")];
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [first, last] = data.span;
  let at = -1;

  const hide = () => {
    cursor.hidden = tip.hidden = true;
    at = -1;
  };

  const show = (index) => {
    at = Math.max(0, Math.min(data.x.length - 1, index));
    const share = (data.x[at] - first) / (last - first);
    const line = (text, colour) => {
      const element = document.createElement("div");
      element.textContent = text;
      if (colour !== undefined) element.className = "key c" + colour;
      return element;
    };
    const values = data.series.filter((s) => s.text[at] && !hidden.has(s.owner));
    tip.replaceChildren(line("step " + data.x[at]), ...values.map((s) => line(s.name + ": " + s.text[at], s.colour)));
    cursor.style.left = 100 * share + "%";
    tip.style.left = share < 0.5 ? 100 * share + "%" : "auto";
    tip.style.right = share < 0.5 ? "auto" : 100 * (1 - share) + "%";
    cursor.hidden = tip.hidden = false;
  };

  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    const x = first + ((event.clientX - box.left) / box.width) * (last - first);
    let nearest = 0;
    data.x.forEach((value, i) => {
      if (Math.abs(value - x) < Math.abs(data.x[nearest] - x)) nearest = i;
    });
    show(nearest);
  };

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: data.x.length - 1 };
    if (event.key === "Escape") hide();
    else if (event.key in steps) {
      show(steps[event.key]);
      event.preventDefault();
    }
  });
}

for (const button of document.querySelectorAll("button[data-owner]")) {
  button.addEventListener("click", () => {
    const { owner } = button.dataset;
    const visible = hidden.delete(owner);
    if (!visible) hidden.add(owner);
    button.setAttribute("aria-pressed", String(visible));
    for (const element of document.querySelectorAll("[data-owner]")) {
      if (element.dataset.owner === owner && element !== button) element.toggleAttribute("hidden", !visible);
    }
  });
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.print")) details.open = true;
});
