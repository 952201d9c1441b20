/* Runs before the first paint, so that no page flashes in the wrong colours; hence no module. */
{
  const kept = JSON.parse(localStorage.getItem("herdling.preferences") ?? "{}").theme;
  if (kept) document.documentElement.dataset.theme = kept;
}
