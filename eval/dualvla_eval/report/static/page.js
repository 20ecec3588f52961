// Behaviour of the report: theme, filters of the gallery (kept in the address), steps in time with the video.
"use strict";

function setUpTheme() {
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

function setUpFilters() {
  const form = document.getElementById("filters");
  if (!form) return;
  const rollouts = [...document.querySelectorAll(".rollout")];
  const selects = [...form.querySelectorAll("select")];
  const show = () => {
    let shown = 0;
    for (const rollout of rollouts) {
      rollout.hidden = selects.some((s) => s.value && rollout.dataset[s.name] !== s.value);
      shown += rollout.hidden ? 0 : 1;
    }
    document.getElementById("count").textContent = `${shown} of ${rollouts.length}`;
  };
  const wanted = new URLSearchParams(location.hash.split("?")[1] || "");
  for (const select of selects) {
    select.value = [...select.options].some((o) => o.value === wanted.get(select.name)) ? wanted.get(select.name) : "";
    select.addEventListener("change", () => {
      const chosen = selects.filter((s) => s.value).map((s) => [s.name, s.value]);
      history.replaceState(null, "", `#rollouts?${new URLSearchParams(chosen)}`);
      show();
    });
  }
  show();
}

function setUpRollout(rollout) {
  const video = rollout.querySelector("video");
  const stepsPerS = Number(rollout.dataset.hz); // the video shows one control step a frame
  const steps = [...rollout.querySelectorAll(".steps li")];
  video.addEventListener("timeupdate", () => {
    const now = Math.min(steps.length - 1, Math.floor(video.currentTime * stepsPerS));
    steps.forEach((step, i) => step.classList.toggle("now", i === now));
  });
  for (const step of steps) {
    step.querySelector(".seek").addEventListener("click", () => {
      video.pause();
      video.currentTime = (Number(step.dataset.step) + 0.5) / stepsPerS;
    });
  }
}

setUpTheme();
setUpFilters();
document.querySelectorAll(".rollout").forEach(setUpRollout);
