"use strict";
(() => {
  const buttons = [...document.querySelectorAll("[data-filter]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      for (const clip of document.querySelectorAll(".clip")) {
        const shown = !button.dataset.filter || clip.dataset.task === button.dataset.filter;
        clip.hidden = !shown;
        if (!shown) clip.querySelector("video")?.pause();
      }
    });
  }

  // At rest a clip shows its middle frame and a play button; native controls appear on demand.
  // One clip plays at a time.
  const videos = [...document.querySelectorAll("video")];
  for (const video of videos) {
    const button = video.parentElement.querySelector(".play");
    let fresh = true;
    const rest = () => {
      if (fresh && video.duration) video.currentTime = video.duration / 2;
    };
    video.controls = false;
    button.hidden = false;
    if (video.readyState >= 1) rest();
    else video.addEventListener("loadedmetadata", rest, { once: true });
    button.addEventListener("click", () => video.play());
    video.addEventListener("click", () => {
      if (!video.controls) video.play();
    });
    video.addEventListener("play", () => {
      if (fresh) video.currentTime = 0;
      fresh = false;
      video.controls = true;
      button.hidden = true;
      for (const other of videos) if (other !== video) other.pause();
    });
    video.addEventListener("pause", () => {
      if (video.matches(":hover, :focus")) return;
      video.controls = false;
      button.hidden = false;
    });
  }

  // The pointer over a chart reads the nearest logged value of every line.
  for (const plot of document.querySelectorAll(".plot[data-chart]")) {
    const data = JSON.parse(plot.dataset.chart);
    const svg = plot.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const readout = document.createElement("div");
    readout.className = "readout";
    readout.hidden = true;
    plot.append(readout);

    const line = (className, text) => {
      const div = document.createElement("div");
      if (className) {
        const dot = document.createElement("i");
        dot.className = `dot b-${className}`;
        div.append(dot);
      }
      div.append(text);
      return div;
    };

    const hide = () => {
      readout.hidden = true;
      cursor.setAttribute("hidden", "");
    };

    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - data.left) / (data.right - data.left);
      if (share < -0.01 || share > 1.01) return hide();
      const x = data.x0 + Math.min(Math.max(share, 0), 1) * (data.x1 - data.x0);
      const rows = [];
      let at = x;
      for (const series of data.series) {
        let best = 0;
        series.xs.forEach((value, i) => {
          if (Math.abs(value - x) < Math.abs(series.xs[best] - x)) best = i;
        });
        const y = series.ys[best];
        if (y === null || y === undefined) continue;
        at = series.xs[best];
        const text = data.percent ? `${(100 * y).toFixed(1)}%` : y.toFixed(3);
        rows.push(line(series.color, `${series.name} ${text}`));
      }
      const title = document.createElement("b");
      title.textContent = `${data.xLabel} ${Math.round(at)}`;
      readout.replaceChildren(title, ...rows);
      readout.hidden = false;
      const px = data.width * (data.left + ((at - data.x0) / (data.x1 - data.x0 || 1)) * (data.right - data.left));
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.removeAttribute("hidden");
      const left = event.clientX - box.left;
      readout.style.top = "40px";
      readout.style.left = left < box.width / 2 ? `${left + 14}px` : "";
      readout.style.right = left < box.width / 2 ? "" : `${box.width - left + 14}px`;
    });
  }
})();
