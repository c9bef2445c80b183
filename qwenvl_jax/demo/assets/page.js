// What Gradio's page lacks for keyboards and screen readers. Runs once, when the page is loaded.
() => {
  const fileName = (image) => decodeURIComponent(image.src.split("/").pop());

  // Gradio draws its parts anew as a conversation grows, without these names and roles.
  const mend = () => {
    document.querySelectorAll("#chat .examples[role=list]").forEach((list) => list.setAttribute("role", "group"));
    document.querySelectorAll("#chat .message img[alt='']").forEach((image) => (image.alt = fileName(image)));
    const label = document.querySelector("#field [data-testid=block-info]")?.textContent;
    document.querySelector("#field textarea:not([aria-label])")?.setAttribute("aria-label", label ?? "");
    document.querySelector("#chat .edit-textarea:not([aria-label])")?.setAttribute("aria-label", label ?? "");
    document.querySelectorAll("button.label-wrap").forEach((button) => {
      const open = button.nextElementSibling?.style.display !== "none";
      if (button.getAttribute("aria-expanded") !== String(open)) button.setAttribute("aria-expanded", open);
    });
  };
  mend();
  new MutationObserver(mend).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["style", "alt"],
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#field .stop-button")?.click();
  });
}
