// The page that report.py writes: makes figures of its captions where one scrolls to, searches them and sorts them.
"use strict";

(() => {
  const AHEAD = "1000px"; // figures are made so far below, before one sees them or reaches them by keyboard
  const find = (id) => document.getElementById(id);
  const main = document.querySelector("main");
  const articles = [...main.querySelectorAll("article")]; // in the order of the file
  const normalize = (text) => text.normalize("NFKC").toLowerCase();

  // The name, the caption and people's captions of an entry; read before a figure takes the place of the plain caption.
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

  // Shows the entries that have all the words one typed, or the beginnings of them.
  function search() {
    const terms = normalize(find("search").value).split(/\s+/);
    let numFound = 0;
    for (const article of articles) {
      article.hidden = !terms.every((term) => texts.get(article).includes(term));
      numFound += !article.hidden;
    }
    const total = articles.length.toLocaleString("en");
    find("found").textContent = terms.join("") ? `${numFound.toLocaleString("en")} of ${total}` : "";
  }

  // The values of the choice are "", or a field of the entries with the sign of the order: "score", "-score".
  function sort() {
    const [, sign, field] = find("order").value.match(/^(-?)(.*)$/);
    const key = (article) => (sign ? -1 : 1) * (article.dataset[field] ?? NaN);
    const compare = (one, other) => {
      const difference = key(one) - key(other);
      return Number.isNaN(difference) ? Number.isNaN(key(one)) - Number.isNaN(key(other)) : difference;
    };
    main.append(...(field ? [...articles].sort(compare) : articles)); // entries without the field come last
  }

  function addOrders() {
    const scored = document.querySelector("[data-score]");
    const name = scored?.querySelector(".score-name").textContent;
    const orders = [["confidence", "least confident first"]];
    if (scored) orders.push(["score", `lowest ${name} first`], ["-score", `highest ${name} first`]);
    for (const [value, text] of orders) find("order").append(new Option(text, value));
  }

  for (const article of articles) observer.observe(article);
  addOrders();
  find("search").addEventListener("input", search);
  find("order").addEventListener("change", sort);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === find("search") || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); // the slash is not typed into the field
    find("search").focus();
    find("search").select();
  });
  find("tools").hidden = false; // it needs this script
  search(); // a page that was reloaded may still have the words in its field
  if (find("order").value) sort();
})();
