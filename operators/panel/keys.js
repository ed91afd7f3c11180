// What a panel in Python cannot do by itself: keys that press buttons, and a slider that keeps the focus.
(() => {
  const PANEL = "[data-cy=panel-content-influence_panel]";
  const KEYS = { a: "(A)", m: "(M)", ArrowRight: "(→)", ArrowLeft: "(←)", Enter: "(Enter)" };
  const TYPING = "input, textarea, select, [contenteditable], [role=slider], [role=combobox], [role=option]";

  const PATIENCE = 3000; // milliseconds
  let pressed = { at: 0, shown: "" };

  // A key presses the button of the panel that says so at its end, unless the key means something where the focus is.
  // Until the panel shows what came of it, further keys do nothing: they would answer once more of the same pair.
  document.addEventListener("keydown", (event) => {
    const sign = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!sign || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest(TYPING) || document.querySelector("[role=dialog], [data-cy=modal]")) return;
    const buttons = [...document.querySelectorAll(`${PANEL} button:not([disabled])`)];
    const button = buttons.find((each) => each.textContent.trim().endsWith(sign) && each.offsetParent);
    if (!button) return;
    event.preventDefault();
    event.stopPropagation(); // else arrows would also move from tab to tab
    const shown = button.closest(PANEL).textContent;
    if (shown === pressed.shown && Date.now() - pressed.at < PATIENCE) return;
    pressed = { at: Date.now(), shown };
    button.click();
  }, true);

  // The App makes the slider anew whenever its value changes: the new one gets the focus of the old one.
  let slid = 0;
  document.addEventListener("keydown", (event) => {
    if (event.target.closest(`${PANEL} [type=range]`)) slid = Date.now();
  }, true);
  new MutationObserver(() => {
    if (Date.now() - slid > 2000 || document.activeElement !== document.body) return;
    document.querySelector(`${PANEL} [type=range]`)?.focus();
  }).observe(document.body, { childList: true, subtree: true });
})();
