// cards: #L7.E12 opens one
let opener = null; // where the focus goes back to
function closeCard() {
  const article = document.getElementById("card"), address = location.hash.slice(1);
  article.hidden = true;
  history.replaceState(null, "", "#experts");
  const link = opener && opener.isConnected ? opener : linkTo(address);
  (link || document.querySelector("#experts h2")).focus();
}
function openCard() {
  const article = document.getElementById("card");
  if (!article) return;
  const address = location.hash.slice(1);
  if (!/^L\d+\.E\d+$/.test(address)) return;
  const found = document.querySelector(`script[data-card="${CSS.escape(address)}"]`), body = make("div");
  const close = make("button", "Close", { type: "button", class: "close" });
  close.addEventListener("click", closeCard);
  if (found) body.innerHTML = found.textContent; // made by the library, which escapes what is not its own
  else body.append(make("p", `This run has no card of ${address}.`));
  article.setAttribute("aria-label", `Card of ${address}`);
  article.replaceChildren(close, body);
  article.hidden = false;
  const trial = document.getElementById("data-trial-expert") && partOf("trial-expert");
  if (trial && trial.choices && trial.choices[address]) {
    const hold = make("div", null, { class: "edge" }), box = make("div", null, { class: "scroll", role: "group", "aria-label": "On trial" });
    const canvas = make("div", null, { class: "canvas", "data-figure": "trial-expert", "data-choice": address });
    box.append(canvas);
    hold.append(box);
    article.append(make("h3", "On trial"), hold);
    watchEdges(box);
    draw(canvas);
  }
  article.scrollIntoView({ block: "start" });
  article.focus({ preventScroll: true });
}
addEventListener("hashchange", openCard);
addEventListener("keydown", (event) => {
  const article = document.getElementById("card");
  if (event.key === "Escape" && article && !article.hidden) closeCard();
});
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest('a[href^="#L"]');
  if (!link) return;
  opener = link;
  if (link.hash === location.hash) openCard(); // no change of the fragment, so no event
});
setTheme(theme);
openCard();
