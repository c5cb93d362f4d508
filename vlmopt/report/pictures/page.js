"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const sections = [...document.querySelectorAll("section")];
  if (!sections.length) return;
  document.documentElement.classList.add("scripted");
  at("tools").hidden = false;
  let canvas, svg, zoom = 1, hits = [], hit = -1;
  const size = new Map(sections.map((section) => {
    const box = section.querySelector("svg").viewBox.baseVal;
    return [section.id, [box.width, box.height]];
  }));

  const show = (id) => {
    for (const section of sections) section.classList.toggle("shown", section.id === id);
    canvas = at(id).querySelector(".canvas");
    svg = canvas.querySelector("svg");
    at("view").value = id;
    outline();
    scale(Math.min(1, Math.max(0.6, (canvas.clientWidth - 16) / size.get(id)[0])));
    canvas.scrollTo(0, 0);
    find();
  };

  const scale = (wanted, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) => {
    const next = Math.min(4, Math.max(0.02, wanted));
    const left = (canvas.scrollLeft + x) / zoom, top = (canvas.scrollTop + y) / zoom;
    const [width, height] = size.get(svg.closest("section").id);
    svg.setAttribute("width", width * next);
    svg.setAttribute("height", height * next);
    zoom = next;
    canvas.scrollTo(left * next - x, top * next - y);
  };

  const outline = () => {
    const frames = [...svg.querySelectorAll("[data-group]")];
    const names = frames.map((frame) => frame.dataset.group).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    at("outline").replaceChildren(new Option("module …", ""), ...names.map((name) => new Option(name, name)));
    at("outline").closest("label").hidden = !names.length;
  };

  const reach = (element) => {
    if (zoom < 0.5) scale(0.9);
    const box = element.getBoundingClientRect(), own = canvas.getBoundingClientRect();
    const middle = Math.min(box.height, own.height) / 2;
    canvas.scrollBy(box.left + Math.min(box.width, own.width) / 2 - own.left - own.width / 2, box.top + middle - own.top - own.height / 2);
  };

  const tell = (node) => {
    at("about").querySelector("pre").textContent = node.querySelector("title").textContent;
    at("about").hidden = false;
  };

  const open = (node) => {
    const operations = svg.closest("section").id.replace("-modules", "-operations");
    const group = node.dataset.key.replace(/^module /, "");
    show(operations);
    const frame = [...svg.querySelectorAll("[data-group]")].find((one) => one.dataset.group === group);
    const inside = [...svg.querySelectorAll(".n")].find((one) => one.dataset.in.startsWith(group));
    reach(frame || inside);
  };

  const find = () => {
    for (const node of document.querySelectorAll(".found")) node.classList.remove("found");
    const wanted = at("find").value.trim().toLowerCase();
    hits = wanted ? [...svg.querySelectorAll(".n")].filter((node) => node.textContent.toLowerCase().includes(wanted)) : [];
    for (const node of hits) node.classList.add("found");
    hit = -1;
    at("hits").textContent = wanted ? `${hits.length} found${hits.length ? ", Enter goes to the next" : ""}` : "";
  };

  const next = (step) => {
    if (!hits.length) return;
    hit = (hit + step + hits.length) % hits.length;
    reach(hits[hit]);
    tell(hits[hit]);
    at("hits").textContent = `${hit + 1} of ${hits.length}`;
  };

  at("view").addEventListener("change", (event) => show(event.target.value));
  at("outline").addEventListener("change", (event) => {
    const frame = [...svg.querySelectorAll("[data-group]")].find((one) => one.dataset.group === event.target.value);
    if (frame) reach(frame);
  });
  at("find").addEventListener("input", find);
  at("find").addEventListener("keydown", (event) => { if (event.key === "Enter") next(event.shiftKey ? -1 : 1); });
  at("in").addEventListener("click", () => scale(zoom * 1.25));
  at("out").addEventListener("click", () => scale(zoom / 1.25));
  at("full").addEventListener("click", () => scale(1));
  at("fit").addEventListener("click", () => {
    const [width, height] = size.get(svg.closest("section").id);
    scale(Math.min((canvas.clientWidth - 20) / width, (canvas.clientHeight - 20) / height));
  });
  at("close").addEventListener("click", () => { at("about").hidden = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") at("about").hidden = true; });

  for (const one of document.querySelectorAll(".canvas")) {
    let drag = null, moved = false;
    one.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const own = one.getBoundingClientRect();
      scale(zoom * Math.exp(-event.deltaY / 300), event.clientX - own.left, event.clientY - own.top);
    }, { passive: false });
    one.addEventListener("pointerdown", (event) => {
      moved = false;
      if (event.pointerType === "mouse" && event.button === 0) drag = [event.clientX, event.clientY];
    });
    one.addEventListener("pointermove", (event) => {
      if (!drag) return;
      const by = [drag[0] - event.clientX, drag[1] - event.clientY];
      if (!moved && Math.hypot(...by) < 4) return;
      moved = true;
      one.classList.add("dragged");
      one.scrollBy(...by);
      drag = [event.clientX, event.clientY];
    });
    for (const name of ["pointerup", "pointerleave"]) {
      one.addEventListener(name, () => { drag = null; one.classList.remove("dragged"); });
    }
    one.addEventListener("click", (event) => {
      const node = event.target.closest(".n");
      if (node && !moved) tell(node);
    });
    one.addEventListener("dblclick", (event) => {
      const node = event.target.closest(".n.group");
      if (node) open(node);
    });
  }
  show(at("view").value);
})();
