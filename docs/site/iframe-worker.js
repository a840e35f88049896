// Browsers start no worker in a page that is opened from the file system. Search then runs in a hidden frame with the same messages.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.waiting = []; // messages that were sent before the script was loaded
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    this.frame.srcdoc = "<!doctype html><script></script>".replace("<script>", `<script src="${url}">`);
    this.frame.addEventListener("load", () => {
      // In a worker `postMessage` sends to the page; in a frame it would send to the frame.
      this.frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const messages = this.waiting;
      this.waiting = null;
      messages.forEach((data) => this.postMessage(data));
    });
    document.body.append(this.frame);
  }

  postMessage(data) {
    if (this.waiting) this.waiting.push(data);
    else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
  }

  terminate() {
    this.frame.remove();
  }
}
if (location.protocol === "file:") {
  window.IFrameWorker = IFrameWorker; // the search script looks for this name
  window.Worker = IFrameWorker;
}
