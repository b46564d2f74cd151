// Everything that a reader of the page would stumble over: {found: lines of text, contrast: the
// lowest ratio of a text to its ground, as WCAG 2 has it}. Evaluated by test_browser.py.
(() => {
  document.querySelectorAll("details").forEach((details) => (details.open = true));
  const found = [];
  const width = document.documentElement.clientWidth;
  const style = getComputedStyle;
  const box = (element) => element.getBoundingClientRect();
  const shown = (element) => {
    const name = element.getAttribute("class") ?? "";
    return `${element.tagName}.${name} "${element.textContent.trim().slice(0, 24)}"`;
  };
  const scrolls = (element) => ["auto", "scroll"].includes(style(element).overflowX);
  const inScroll = (element) => element && (scrolls(element) || inScroll(element.parentElement));
  const isForReadersAloud = (element) =>
    element && (style(element).clipPath !== "none" || isForReadersAloud(element.parentElement));
  const holdsText = (element) =>
    [...element.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());

  // ---- Nothing beyond its place ----
  const sheet = document.documentElement;
  if (sheet.scrollWidth > width)
    found.push(`the page scrolls sideways: ${sheet.scrollWidth} > ${width}`);
  const column = box(document.querySelector("main"));
  for (const element of document.body.querySelectorAll("*")) {
    if (!box(element).width || element.closest("defs")) continue;
    if (element instanceof HTMLElement && isForReadersAloud(element)) continue;
    const { left, right } = box(element);
    const outside = right > column.right + 0.5 || left < column.left - 0.5;
    if (outside && !inScroll(element.parentElement))
      found.push(`beyond the column: ${shown(element)}`);
    if (element instanceof SVGElement || style(element).display === "inline") continue;
    const overflows = element.scrollWidth > element.clientWidth + 1;
    if (overflows && holdsText(element) && !scrolls(element))
      found.push(`text wider than its box: ${shown(element)}`);
    if (overflows && ["hidden", "clip"].includes(style(element).overflowX))
      found.push(`cut off: ${shown(element)}`);
  }

  // ---- Tables that scroll keep the names of their rows in view ----
  for (const region of document.querySelectorAll(".scroll")) {
    if (!scrolls(region) || region.scrollWidth <= region.clientWidth) continue;
    region.scrollLeft = region.scrollWidth;
    for (const name of region.querySelectorAll("tbody th")) {
      name.scrollIntoView({ block: "center", inline: "nearest" });
      const edge = box(region).left;
      if (style(name).position !== "sticky" || Math.abs(box(name).left - edge) > 1)
        found.push(`a row's name scrolls away: ${shown(name)}`);
      if (box(name).width > 0.55 * region.clientWidth)
        found.push(`a row's name leaves no room to scroll in: ${shown(name)}`);
      const top = document.elementFromPoint(edge + 2, box(name).top + box(name).height / 2);
      if (!name.contains(top))
        found.push(`a row's name is covered: ${shown(name)}`);
    }
    region.scrollLeft = 0;
  }

  // ---- Plots ----
  for (const svg of document.querySelectorAll(".plot svg, .strip svg")) {
    if (!(box(svg).width > 100 && box(svg).height > 10 && box(svg).height < 600))
      found.push(`size of a plot: ${box(svg).width} x ${box(svg).height}`);
    const labels = [...svg.querySelectorAll("text")];
    for (const a of labels) {
      if (box(a).height < 9) found.push(`too small to read: ${shown(a)}, ${box(a).height} px`);
      for (const b of labels.slice(labels.indexOf(a) + 1)) {
        const [p, q] = [box(a), box(b)];
        const apart = p.right < q.left || q.right < p.left || p.bottom < q.top || q.bottom < p.top;
        if (!apart) found.push(`overlap: ${shown(a)} and ${shown(b)}`);
      }
    }
  }
  for (const mark of document.querySelectorAll(".plot path[style*=series], .strip circle"))
    if (!(box(mark).width > 0)) found.push(`nothing drawn: ${mark.outerHTML.slice(0, 60)}`);

  // ---- Contrast ----
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, opaque] = canvas.getImageData(0, 0, 1, 1).data;
    const [x, y, z] = [r, g, b]
      .map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return opaque ? 0.2126 * x + 0.7152 * y + 0.0722 * z : null;
  };
  const grounds = (element) => {
    if (!element) return [1];
    const bars = style(element).backgroundImage.match(/rgba?\([^)]*\)/g) ?? [];
    const own = luminance(style(element).backgroundColor);
    return [...bars.map(luminance), ...(own === null ? grounds(element.parentElement) : [own])];
  };
  let contrast = 21;
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const element = words.currentNode.parentElement;
    if (!words.currentNode.data.trim()) continue;
    const ink = luminance(style(element)[element instanceof SVGElement ? "fill" : "color"]);
    for (const ground of grounds(element)) {
      const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
      contrast = Math.min(contrast, ratio);
      if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${shown(element)}`);
    }
  }
  return { found, contrast };
})();
