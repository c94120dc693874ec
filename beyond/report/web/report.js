// The page that report.py writes: turns its captions into figures near the visible part, searches and sorts them.
"use strict";

(() => {
  const AHEAD = "1000px"; // figures are made this far below the visible part
  const [search, order, count, main] = ["#search", "#order", "#count", "main"].map((one) => document.querySelector(one));
  const articles = [...main.querySelectorAll("article")]; // in the order of the file
  const normalize = (text) => text.normalize("NFKC").toLowerCase();

  // The name, the caption and people's captions of an entry, read before a figure replaces the plain caption.
  const texts = new Map(
    articles.map((article) => {
      const parts = [...article.querySelectorAll("h2, figcaption, li")];
      return [article, normalize(parts.map((part) => part.textContent).join("\n"))];
    }),
  );

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        window.captionViewer.enhance(target);
      }
    },
    { rootMargin: AHEAD },
  );

  // Shows the entries that contain all the words, or beginnings of words, in the search field.
  function filter() {
    const terms = normalize(search.value).split(/\s+/);
    for (const article of articles) article.hidden = !terms.every((term) => texts.get(article).includes(term));
    const numShown = articles.filter((article) => !article.hidden).length;
    const total = articles.length.toLocaleString("en");
    count.textContent = terms.join("") ? `${numShown.toLocaleString("en")} of ${total}` : `${total} images`;
  }

  // An order is "", or a field of the entries with a sign for descending: "score", "-score".
  function sort() {
    const [, sign, field] = order.value.match(/^(-?)(.*)$/);
    const key = (article) => (field in article.dataset ? (sign ? -1 : 1) * article.dataset[field] : Infinity);
    main.append(...(field ? [...articles].sort((one, other) => key(one) - key(other) || 0) : articles));
  }

  order.append(new Option("least confident first", "confidence"));
  if (document.querySelector("[data-score]")) {
    order.append(new Option("lowest CIDEr first", "score"), new Option("highest CIDEr first", "-score"));
  }
  for (const article of articles) observer.observe(article);
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); // the slash is not typed into the field
    search.focus();
    search.select();
  });
  document.querySelector("#tools").hidden = false; // it needs this script
  filter(); // a page that was reloaded may still have its search and order
  sort();
})();
