// Typesets what pymdownx.arithmatex has marked: \( \) within a line, \[ \] on its own.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\[") });
}
