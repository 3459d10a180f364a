// What depends on the width of the page: boxes that scroll can be reached from the keyboard (the theme sees to code and
// tables only), and inline mathematics that is wide breaks with its line (short formulas are kept whole).
function fit() {
  for (const box of document.querySelectorAll(".study-figure, mjx-container[display]")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
  for (const formula of document.querySelectorAll("span.math")) {
    formula.classList.remove("math-wide");
    const column = formula.closest("p, li, dd, td, figcaption");
    formula.classList.toggle("math-wide", column !== null && formula.offsetWidth > 0.6 * column.clientWidth);
  }
}
window.addEventListener("load", () => window.MathJax.startup.promise.then(fit));
window.addEventListener("resize", fit);

// Paper is light, whatever the screen was.
let onScreen;
window.addEventListener("beforeprint", () => {
  onScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
window.addEventListener("afterprint", () => { document.documentElement.dataset.theme = onScreen; });
