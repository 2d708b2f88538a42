"use strict";
// A page opened from disk may start no worker. What the theme's search runs in one then runs in a frame of its own, which
// is told and tells the same.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(address) {
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.addEventListener("load", () => this.begin(address), { once: true });
      document.body.append(this.frame);
    }

    begin(address) {
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data: structuredClone(data) }));
      const script = inside.document.createElement("script");
      script.src = address;
      script.addEventListener("load", () => {
        this.tell = (data) => inside.onmessage({ data });
        this.waiting.forEach(this.tell);
      });
      script.addEventListener("error", (event) => this.onerror?.(event));
      inside.document.head.append(script);
    }

    postMessage(data) {
      const copy = structuredClone(data);
      if (this.tell) this.tell(copy);
      else this.waiting.push(copy);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
