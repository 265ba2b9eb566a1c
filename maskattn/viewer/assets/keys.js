// The keys of the page; those that pan and zoom are Leaflet's own.

/** Listen for keys: `actions` maps each to what it does. Fields that are typed in keep theirs. */
export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    const at = event.target;
    const typing = at instanceof HTMLInputElement && at.type === "search";
    const choosing = at instanceof HTMLSelectElement;
    if (at instanceof HTMLInputElement && at.type === "range" && event.key === "Home") return;
    if ((typing || choosing) && event.key !== "Escape") return;
    const action = actions[event.key];
    if (action === undefined) return;
    event.preventDefault();
    action();
  });
}
