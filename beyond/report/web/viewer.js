// Shows an image with its caption; a word that is hovered, focused or tapped lights up where the model attended.
//
//     captionViewer.create(imageUrl, alt, result)   // a <figure>, of what Caption.to_json(with_attention=True) returns
//     captionViewer.enhance(element)                // makes figures of the plain captions that report.py wrote into it
//
// All text becomes textContent: captions and file names may hold anything, markup too.
"use strict";

// A notebook has this script once in every cell that shows a caption; the first one serves all.
window.captionViewer ??= (() => {
  const CUT = "cut: the model predicted no end";
  const CANVAS_SIDE = 96; // pixels; the browser stretches the canvas over the image
  const DARKNESS = 0.78; // opacity of black where the attention is 0
  const GLOW = 0.1; // opacity of white where the attention is largest, which is visible in a dark image too
  let clearKept = () => {}; // clears the word that stays lit, focused or tapped: at most one on the page

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") clearKept();
  });

  // Text.

  function formatPercent(probability) {
    return probability >= 0.005 ? `${Math.round(100 * probability)} %` : "< 1 %"; // as the plots have it
  }

  function describeWord(word) {
    return `${word.word}, ${formatPercent(word.probability)}`;
  }

  function formatScores(result) {
    const logProb = Number(result.log_prob).toFixed(2).replace("-", "−");
    const consensus = "consensus" in result ? `, consensus ${Number(result.consensus).toFixed(0)}` : "";
    return `log p ${logProb}, confidence ${formatPercent(result.confidence)}${consensus}`;
  }

  function make(tag, className, text = "", attributes = {}) {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  // Attention.

  // The weight (Catmull-Rom's) of a location that lies so many locations away; the plots upsample with the same.
  function cubic(distance) {
    const x = Math.abs(distance);
    if (x >= 2) return 0;
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((2.5 - 0.5 * x) * x - 4) * x + 2;
  }

  // Enlarges rows of `side` numbers to CANVAS_SIDE numbers, and transposes; done twice, it enlarges a square grid.
  function enlargeRows(grid, side) {
    const numRows = grid.length / side;
    const enlarged = new Float32Array(numRows * CANVAS_SIDE);
    for (let column = 0; column < CANVAS_SIDE; column++) {
      const center = ((column + 0.5) * side) / CANVAS_SIDE - 0.5;
      for (let place = Math.floor(center) - 1; place <= Math.floor(center) + 2; place++) {
        const source = Math.min(side - 1, Math.max(0, place)); // outside the image the border is repeated
        const weight = cubic(center - place);
        for (let row = 0; row < numRows; row++) enlarged[column * numRows + row] += weight * grid[row * side + source];
      }
    }
    return enlarged;
  }

  // Draws darkness with a light in it: full light at the largest weight, whatever it is.
  function drawAttention(canvas, weights) {
    const side = Math.round(Math.sqrt(weights.length));
    const light = enlargeRows(enlargeRows(weights, side), side);
    const largest = Math.max(...light, 1e-9);
    const pixels = new ImageData(CANVAS_SIDE, CANVAS_SIDE);
    light.forEach((value, index) => {
      const share = Math.max(0, value / largest);
      const alpha = DARKNESS * (1 - share) + GLOW * share;
      pixels.data.fill((255 * GLOW * share) / alpha, 4 * index, 4 * index + 3);
      pixels.data[4 * index + 3] = 255 * alpha;
    });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // The figure.

  // The image under its canvas, and the line that names the word: the hovered one, or else the one that is kept.
  class Display {
    constructor(image, idleText) {
      this.box = make("div", "cv-image");
      const size = { width: CANVAS_SIDE, height: CANVAS_SIDE };
      this.canvas = make("canvas", "cv-attention", "", { ...size, "aria-hidden": true });
      this.box.append(image, this.canvas);
      this.status = make("p", "cv-status", idleText, { "aria-live": "polite" });
      this.idleText = idleText;
      this.hovered = this.kept = null; // words, with their buttons: {word, probability, attention, button}
    }

    update(change) {
      const before = this.hovered ?? this.kept;
      Object.assign(this, change);
      const shown = this.hovered ?? this.kept;
      if (shown === before) return;
      before?.button.classList.remove("cv-lit");
      shown?.button.classList.add("cv-lit");
      if (shown?.attention) drawAttention(this.canvas, shown.attention);
      this.box.classList.toggle("cv-dark", Boolean(shown?.attention));
      this.status.textContent = shown ? describeWord(shown) : this.idleText;
    }

    keep(word) {
      if (this.kept === word) return;
      clearKept();
      word.button.setAttribute("aria-pressed", "true");
      this.update({ kept: word, hovered: null }); // the mouse may still lie on another
      clearKept = () => {
        word.button.setAttribute("aria-pressed", "false");
        this.update({ kept: null, hovered: null });
        clearKept = () => {};
      };
    }
  }

  function moveFocus(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault(); // the page would scroll
    const words = [...event.currentTarget.querySelectorAll(".cv-word")];
    const direction = getComputedStyle(event.currentTarget).direction === "rtl" ? -step : step;
    words[words.indexOf(event.target) + direction]?.focus();
  }

  function makeWord(fields, display) {
    const label = describeWord(fields);
    const attributes = { type: "button", title: label, "aria-label": label, "aria-pressed": false };
    const button = make("button", "cv-word", fields.word, attributes);
    const word = { ...fields, button };
    button.style.setProperty("--cv-probability", Number(word.probability) || 0);
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "touch") display.update({ hovered: word }); // a finger does not hover: it taps
    });
    button.addEventListener("pointerleave", () => display.update({ hovered: null }));
    button.addEventListener("focus", () => {
      if (button.matches(":focus-visible")) display.keep(word); // by keyboard; a click comes by itself
    });
    button.addEventListener("click", () => (display.kept === word ? clearKept() : display.keep(word)));
    return button;
  }

  // A caption as buttons, with spaces where its text has them: Chinese has none between words.
  function makeLine(result, display) {
    const line = make("p", "cv-line", "", { dir: "auto" });
    let rest = result.caption;
    for (const word of result.words) {
      const trimmed = rest.trimStart();
      const isNext = trimmed.startsWith(word.word);
      if (line.firstChild && (!isNext || trimmed !== rest)) line.append(" ");
      line.append(makeWord(word, display));
      if (isNext) rest = trimmed.slice(word.word.length);
    }
    if (!result.words.length) line.append(make("span", "cv-none", "(no words)"));
    if (result.finished === false) {
      line.append(" ", make("span", "cv-cut", "…", { title: CUT, role: "img", "aria-label": CUT }));
    }
    line.addEventListener("keydown", moveFocus);
    return line;
  }

  function makeAlternatives(results, display) {
    const list = make("ol", "cv-alternatives", "", { start: 2, "aria-label": "further captions" }); // the 1st is above
    for (const result of results) {
      const item = make("li", "");
      item.append(makeLine(result, display), make("p", "cv-scores", formatScores(result)));
      list.append(item);
    }
    return list;
  }

  function makeSimilarImages(images) {
    const details = make("details", "cv-similar");
    details.append(make("summary", "", "similar training images, by whose captions this one was chosen"));
    for (const image of images) {
      details.append(make("p", "cv-scores", `${image.image}, cosine ${Number(image.cosine).toFixed(2)}`));
      const list = make("ul", "");
      list.append(...image.captions.map((caption) => make("li", "", caption, { dir: "auto" })));
      details.append(list);
    }
    return details;
  }

  /** Makes the figure; the image is an address, or an <img> to use. */
  function create(image, alt, result) {
    const element = image instanceof HTMLImageElement ? image : make("img", "", "", { src: image });
    element.alt = alt;
    const figure = make("figure", "caption-viewer");
    const display = new Display(element, formatScores(result));
    const text = make("figcaption", "cv-text");
    text.append(makeLine(result, display), display.status);
    if (result.alternatives?.length) text.append(makeAlternatives(result.alternatives, display));
    if (result.similar_images?.length) text.append(makeSimilarImages(result.similar_images));
    figure.append(display.box, text);
    figure.addEventListener("focusout", (event) => {
      if (!figure.contains(event.relatedTarget) && display.kept) clearKept();
    });
    return figure;
  }

  /** Makes figures of plain captions: elements with an image, and the caption as JSON. */
  function enhance(root) {
    for (const plain of root.querySelectorAll(".caption-viewer-plain")) {
      const image = plain.querySelector("img");
      const result = JSON.parse(plain.querySelector("script").textContent);
      plain.replaceWith(create(image, image.alt, result));
    }
  }

  return { create, enhance };
})();
