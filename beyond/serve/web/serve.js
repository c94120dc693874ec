// The local page: sends an image to POST /caption, and shows the answer with captionViewer.
"use strict";

(() => {
  const DEBOUNCE_MS = 300; // a slider that is moved asks once, when it rests
  const SCALED_SIDE = 2048; // pixels of the longer side of an image that is too large to be sent as it is
  const find = (id) => document.getElementById(id);
  const settings = { captions: find("captions"), beam: find("beam"), sample: find("sample"), temperature: find("temperature") };
  const page = document.documentElement;
  let maxBytes = Infinity; // of a request; the server says it
  let image = null; // what is captioned: {blob, url, canShow, note}
  let firstSeed = 0; // of random words: the server's default
  let seed = 0; // "Draw again" takes the next
  let request = null; // the AbortController of the request in work
  let timer = 0;
  let stream = null; // of the camera

  // Messages.

  function showError(text) {
    find("error").textContent = text;
    if (!request) setStatus("");
  }

  function setStatus(text, isBusy = false) {
    find("status").textContent = text;
    find("status").classList.toggle("is-busy", isBusy);
    find("result").classList.toggle("is-old", isBusy);
  }

  // Images.

  async function decode(url) {
    const element = new Image();
    element.src = url;
    try {
      await element.decode();
      return element;
    } catch {
      return null; // a format that only the server may know, such as HEIC, or no image
    }
  }

  function drawScaled(source, width, height, side) {
    const scale = Math.min(1, side / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  }

  // A grey area in place of an image that the browser cannot show.
  function drawPlaceholder() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [480, 360];
    const context = canvas.getContext("2d");
    context.fillStyle = "#8a8f98";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "white";
    context.font = "18px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillText("this browser cannot show the image", canvas.width / 2, canvas.height / 2);
    return canvas.toDataURL();
  }

  async function openImage(blob) {
    stopCamera();
    stopRequest(); // its answer would show the image whose address is given up below
    clearTimeout(timer); // of a slider: the image is captioned with its value below
    find("error").textContent = "";
    if (image) URL.revokeObjectURL(image.url);
    image = { blob, url: URL.createObjectURL(blob), note: "" };
    const opened = image;
    const element = await decode(opened.url);
    await serverRead; // the defaults come from there
    if (opened !== image) return; // another image was chosen meanwhile
    opened.canShow = Boolean(element);
    if (blob.size > maxBytes && element) {
      opened.blob = await drawScaled(element, element.naturalWidth, element.naturalHeight, SCALED_SIDE);
      opened.note = ` The image was scaled down to ${SCALED_SIDE} pixels before it was sent.`;
    }
    seed = firstSeed;
    await requestCaption();
  }

  function openFiles(files) {
    if (files.length) openImage(files[0]);
    else showError("Expected an image file; save the image first, then drop the file or choose it.");
  }

  // Captions.

  function parameters() {
    const query = new URLSearchParams({ captions: settings.captions.value, sample: settings.sample.checked });
    if (settings.sample.checked) {
      query.set("temperature", settings.temperature.value);
      query.set("decode_seed", seed);
    } else {
      query.set("beam_size", settings.beam.value);
    }
    return query;
  }

  function stopRequest() {
    if (request) request.abort();
    request = null;
  }

  async function requestCaption() {
    clearTimeout(timer);
    if (!image) return;
    stopRequest();
    const current = image;
    find("error").textContent = "";
    if (current.blob.size > maxBytes) {
      showFailure(`Expected a file of at most ${maxBytes / 1e6} MB, found ${(current.blob.size / 1e6).toFixed(1)} MB.`);
      return;
    }
    const controller = (request = new AbortController());
    setStatus("Captioning …", true);
    try {
      const response = await fetch(`caption?${parameters()}`, {
        method: "POST",
        body: current.blob,
        headers: { "Content-Type": current.blob.type || "application/octet-stream" },
        signal: controller.signal,
      });
      const text = await response.text();
      if (controller.signal.aborted) return;
      request = null;
      const result = parseAnswer(text, response.status);
      if (result.error) showFailure(result.error);
      else showResult(current, result);
    } catch (error) {
      if (controller.signal.aborted) return;
      request = null;
      showFailure("The server does not answer. Is it still running?");
    }
  }

  function parseAnswer(text, status) {
    try {
      return JSON.parse(text);
    } catch {
      return { error: `The server, or a proxy before it, answered ${status} and no caption.` };
    }
  }

  function showFailure(text) {
    find("result").replaceChildren(); // what is there belongs to another image or other settings
    showError(text);
  }

  function showResult(shown, result) {
    const url = shown.canShow ? shown.url : drawPlaceholder();
    find("result").replaceChildren(window.captionViewer.create(url, result.caption, result));
    find("error").textContent = ""; // of something else that was tried meanwhile
    setStatus(`Captioned in ${result.seconds.toFixed(2)} s.${shown.note}`);
  }

  // Settings.

  function updateSettings() {
    const isRandom = settings.sample.checked;
    settings.beam.disabled = isRandom;
    settings.temperature.disabled = !isRandom;
    find("again").hidden = !isRandom;
    for (const output of document.querySelectorAll("output")) {
      const input = find(output.htmlFor.value);
      output.value = input.value;
      output.parentElement.classList.toggle("is-off", input.disabled);
    }
  }

  function settingsChanged() {
    updateSettings();
    clearTimeout(timer);
    timer = setTimeout(requestCaption, DEBOUNCE_MS);
  }

  // A slider takes only values within its ends and on its steps: the server's may lie outside.
  function setSlider(input, value) {
    input.max = Math.max(input.max, value);
    input.min = Math.min(input.min, value);
    if (Math.abs(value / input.step - Math.round(value / input.step)) > 1e-9) input.step = "any";
    input.value = value;
  }

  async function readServer() {
    const { run, max_bytes, defaults } = await (await fetch("health")).json();
    find("run").textContent = `run: ${run}`;
    maxBytes = max_bytes;
    settings.beam.min = defaults.choose === "consensus" ? 2 : 1; // where 1 is its default, the widest
    setSlider(settings.captions, defaults.captions);
    setSlider(settings.beam, defaults.beam_size);
    setSlider(settings.temperature, defaults.temperature);
    settings.sample.checked = defaults.sample;
    firstSeed = seed = defaults.decode_seed;
  }

  // The camera.

  async function startCamera() {
    find("error").textContent = "";
    if (!navigator.mediaDevices) {
      const address = `http://127.0.0.1:${location.port || 80}/`;
      showError(`Browsers give the camera only to pages of this machine and to https; open ${address} or choose a file.`);
      return;
    }
    try {
      const opened = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      stopCamera(); // of an earlier click
      stream = opened;
    } catch (error) {
      const reasons = {
        NotAllowedError: "The camera may not be used: the browser was told to refuse it.",
        NotFoundError: "No camera was found.",
      };
      showError(`${reasons[error.name] || "The camera cannot be used."} Choose a file instead.`);
      return;
    }
    find("video").srcObject = stream;
    find("viewfinder").hidden = false;
    find("shoot").focus();
  }

  function stopCamera() {
    if (!stream) return;
    for (const track of stream.getTracks()) track.stop();
    stream = null;
    find("video").srcObject = null;
    find("viewfinder").hidden = true;
    find("camera").focus();
  }

  async function takePicture() {
    const video = find("video");
    if (!video.videoWidth) return; // its first frame has not come yet
    openImage(await drawScaled(video, video.videoWidth, video.videoHeight, SCALED_SIDE));
  }

  // Events.

  // Phones have a camera behind a file input; elsewhere that input would only open another dialog for files.
  find("photo").hidden = !navigator.maxTouchPoints;
  for (const id of ["file", "capture"]) {
    find(id).addEventListener("change", (event) => {
      if (event.target.files.length) openFiles(event.target.files);
      event.target.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("dragover", (event) => {
    event.preventDefault(); // or the browser would open the file instead of this page
    page.classList.add("is-dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) page.classList.remove("is-dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    page.classList.remove("is-dragging");
    openFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => openFiles(event.clipboardData.files));
  find("camera").addEventListener("click", startCamera);
  find("shoot").addEventListener("click", takePicture);
  find("cancel").addEventListener("click", stopCamera);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopCamera();
  });
  for (const input of Object.values(settings)) input.addEventListener("input", settingsChanged);
  find("again").addEventListener("click", () => {
    seed += 1;
    requestCaption();
  });
  const serverRead = readServer().then(updateSettings, () => showError("The server does not answer. Is it still running?"));
})();
