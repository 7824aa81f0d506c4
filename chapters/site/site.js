// What is wider than its column scrolls; the Tab key has to reach it, or the keyboard cannot.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const wide of document.querySelectorAll('mjx-container[display="true"], .bd-content table, .text_html'))
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
});
