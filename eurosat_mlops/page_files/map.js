"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const view = at("view"), stack = at("stack"), cells = at("cells"), source = at("source"), bar = at("scale");
  const size = Object.fromEntries(Object.entries(at("size").dataset).map(([k, v]) => [k, Number(v)]));
  const metres = size.cell / size.stride;
  let zoom = 1, left = 0, top = 0;
  const show = () => {
    stack.style.width = size.width * zoom + "px";
    stack.style.height = size.height * zoom + "px";
    stack.style.transform = `translate(${left}px, ${top}px)`;
    const wish = 120 * metres / zoom, power = 10 ** Math.floor(Math.log10(wish));
    const long = [5, 2, 1].find((n) => n * power <= wish) * power;
    bar.style.width = long / metres * zoom + "px";
    bar.firstElementChild.textContent = long >= 1000 ? long / 1000 + " km" : long + " m";
  };
  const whole = () => {
    zoom = Math.min(view.clientWidth / size.width, view.clientHeight / size.height);
    left = (view.clientWidth - size.width * zoom) / 2;
    top = (view.clientHeight - size.height * zoom) / 2;
    show();
  };
  const scaleBy = (factor, x = view.clientWidth / 2, y = view.clientHeight / 2) => {
    const next = Math.min(8, Math.max(0.01, zoom * factor));
    left = x - (x - left) * next / zoom;
    top = y - (y - top) * next / zoom;
    zoom = next;
    show();
  };
  const move = (x, y) => { left += x; top += y; show(); };
  const draw = () => {
    const scale = size.stride > 8 ? 8 : size.stride;
    cells.width = Math.round(size.width / size.stride * scale);
    cells.height = Math.round(size.height / size.stride * scale);
    const pen = cells.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(source, 0, 0, source.naturalWidth * scale, source.naturalHeight * scale);
  };
  const fingers = new Map();
  view.addEventListener("pointerdown", (e) => { view.setPointerCapture(e.pointerId); fingers.set(e.pointerId, e); });
  view.addEventListener("pointermove", (e) => {
    const before = fingers.get(e.pointerId);
    if (!before) return;
    const box = view.getBoundingClientRect();
    if (fingers.size === 2) {
      const other = [...fingers.values()].find((f) => f.pointerId !== e.pointerId);
      const gap = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY) || 1;
      scaleBy(gap(e) / gap(before), other.clientX - box.left, other.clientY - box.top);
    } else move(e.clientX - before.clientX, e.clientY - before.clientY);
    fingers.set(e.pointerId, e);
  });
  for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, (e) => fingers.delete(e.pointerId));
  view.addEventListener("wheel", (e) => {
    e.preventDefault();
    const box = view.getBoundingClientRect();
    scaleBy(Math.exp(-e.deltaY / 400), e.clientX - box.left, e.clientY - box.top);
  }, { passive: false });
  const keys = { ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60),
    ArrowDown: () => move(0, -60), "+": () => scaleBy(1.25), "=": () => scaleBy(1.25), "-": () => scaleBy(0.8), "0": whole };
  view.addEventListener("keydown", (e) => { if (keys[e.key]) { e.preventDefault(); keys[e.key](); } });
  at("in").addEventListener("click", () => scaleBy(1.25));
  at("out").addEventListener("click", () => scaleBy(0.8));
  at("all").addEventListener("click", whole);
  at("opacity").addEventListener("input", (e) => { cells.style.opacity = e.target.value / 100; at("percent").textContent = e.target.value; });
  addEventListener("resize", whole);
  if (source.complete) draw();
  source.addEventListener("load", draw);
  whole();
})();
