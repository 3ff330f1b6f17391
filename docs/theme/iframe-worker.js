// The search runs in a worker, which browsers do not start from disk: there the same script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const load = (source) =>
        new Promise((loaded, failed) => {
          const script = inside.document.createElement("script");
          Object.assign(script, {src: new URL(source, document.baseURI), onload: loaded, onerror: failed});
          inside.document.body.append(script);
        });
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
      const ready = load(url);
      this.postMessage = (data) => ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", {data})));
    }
  };
}
